/* A stand-in for NVIDIA's driver, for machines without a GPU: libcuda.so.1 and libnvcuvid.so.1 in one.
 *
 * FFmpeg's own NVDEC code runs on it. "Decoding" a picture paints it in one shade of gray, which tells the
 * number of bytes that the picture's data have: thus a test can tell which packet a picture is of.
 *
 * NVDEC_STUB names what is to fail: `init`, `create` (a decoder), `decode` (its third picture), or `crash`.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define Z(name) int name(void) { return 0; }

static int told_to(const char *what)
{
    const char *told = getenv("NVDEC_STUB");
    return told && !strcmp(told, what);
}

/* --- libcuda --- */

static unsigned context_flags;
static int contexts;
static void *const CONTEXT = (void *)0x1234;

int cuInit(unsigned flags)
{
    /* As CUDA does, reserve far more address space than any limit on a worker. */
    static void *reserved;
    if (told_to("init"))
        return 100; /* CUDA_ERROR_NO_DEVICE */
    if (!reserved)
        reserved = mmap(0, 64ul << 30, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return reserved == MAP_FAILED ? 2 : 0;
}

int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "Stub"); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 512; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { contexts++; *context = CONTEXT; return 0; }
int cuDevicePrimaryCtxRelease(int device) { contexts--; return 0; }
int cuDevicePrimaryCtxSetFlags(int device, unsigned flags) { context_flags = flags; return 0; }

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active)
{
    *flags = context_flags;
    *active = contexts > 0;
    return 0;
}

/* No context beside the primary one. */
int cuCtxCreate_v2(void **context, unsigned flags, int device) { return 1; }
int cuCtxPushCurrent_v2(void *context) { return context == CONTEXT && contexts > 0 ? 0 : 201; }
int cuCtxPopCurrent_v2(void **context) { *context = CONTEXT; return 0; }
int cuMemAlloc_v2(uintptr_t *memory, size_t size) { return (*memory = (uintptr_t)malloc(size)) ? 0 : 2; }
int cuMemFree_v2(uintptr_t memory) { free((void *)memory); return 0; }

int cuMemAllocPitch_v2(uintptr_t *memory, size_t *pitch, size_t width, size_t height, unsigned element)
{
    *pitch = (width + 511) & ~(size_t)511;
    return cuMemAlloc_v2(memory, *pitch * height);
}

struct side { size_t x, y; int type; char *host; uintptr_t device; void *array; size_t pitch; };
struct copy { struct side from, to; size_t width, height; };

static char *at(const struct side *side)
{
    char *memory = side->type == 1 ? side->host : (char *)side->device; /* CU_MEMORYTYPE_HOST */
    return memory + side->y * side->pitch + side->x;
}

int cuMemcpy2D_v2(const struct copy *copy)
{
    for (size_t row = 0; row < copy->height; row++)
        memcpy(at(&copy->to) + row * copy->to.pitch, at(&copy->from) + row * copy->from.pitch, copy->width);
    return 0;
}

int cuMemcpy2DAsync_v2(const struct copy *copy, void *stream) { return cuMemcpy2D_v2(copy); }

/* --- libnvcuvid --- */

struct caps {
    int codec, chroma;
    unsigned extra_bits, reserved[3];
    unsigned char supported, engines;
    unsigned short formats;
    unsigned max_width, max_height, max_blocks;
    unsigned short min_width, min_height;
};
struct creation { unsigned long width, height, surfaces; int codec, chroma; unsigned long flags, bits; };
struct picture { int size[2], index, fields[3]; unsigned num_bytes; };
struct decoder { struct creation made; unsigned char shade[64]; int pictures; };

int cuvidGetDecoderCaps(struct caps *caps)
{
    caps->supported = caps->chroma == 1 && caps->extra_bits == 0;
    caps->engines = 3;
    caps->formats = 3;
    caps->max_width = caps->max_height = 4096;
    caps->max_blocks = 65536;
    return 0;
}

int cuvidCreateDecoder(struct decoder **decoder, const struct creation *creation)
{
    if (told_to("create"))
        return 2;
    *decoder = calloc(1, sizeof **decoder);
    (*decoder)->made = *creation;
    return 0;
}

int cuvidDestroyDecoder(struct decoder *decoder) { free(decoder); return 0; }

int cuvidDecodePicture(struct decoder *decoder, const struct picture *picture)
{
    if (++decoder->pictures == 3 && told_to("crash"))
        abort();
    if (decoder->pictures >= 3 && told_to("decode"))
        return 700;
    decoder->shade[picture->index] = 16 + picture->num_bytes % 219;
    return 0;
}

int cuvidMapVideoFrame64(struct decoder *decoder, int index, uint64_t *memory, unsigned *pitch, void *how)
{
    size_t luma;
    *pitch = (decoder->made.width + 511) & ~511u;
    luma = *pitch * decoder->made.height;
    *memory = (uintptr_t)malloc(luma * 3 / 2);
    memset((char *)*memory, decoder->shade[index], luma);
    memset((char *)*memory + luma, 128, luma / 2);
    return 0;
}

int cuvidUnmapVideoFrame64(struct decoder *decoder, uint64_t memory) { free((void *)memory); return 0; }

/* What else FFmpeg wants to find; none of it is called for decoding. */
Z(cuArray3DCreate_v2) Z(cuArrayCreate_v2) Z(cuArrayDestroy) Z(cuCtxDestroy_v2) Z(cuCtxGetCurrent)
Z(cuCtxGetDevice) Z(cuCtxSetLimit) Z(cuDeviceComputeCapability) Z(cuDeviceGetCount)
Z(cuDevicePrimaryCtxReset) Z(cuDriverGetVersion) Z(cuEventCreate) Z(cuEventDestroy_v2)
Z(cuEventQuery) Z(cuEventRecord) Z(cuEventSynchronize) Z(cuGLGetDevices_v2) Z(cuGetErrorName)
Z(cuGetErrorString) Z(cuGraphicsGLRegisterImage) Z(cuGraphicsMapResources)
Z(cuGraphicsResourceGetMappedPointer_v2) Z(cuGraphicsSubResourceGetMappedArray)
Z(cuGraphicsUnmapResources) Z(cuGraphicsUnregisterResource) Z(cuLaunchKernel) Z(cuLinkAddData)
Z(cuLinkComplete) Z(cuLinkCreate) Z(cuLinkDestroy) Z(cuMemAllocManaged) Z(cuMemcpy) Z(cuMemcpyAsync)
Z(cuMemcpyDtoDAsync_v2) Z(cuMemcpyDtoD_v2) Z(cuMemcpyDtoHAsync_v2) Z(cuMemcpyDtoH_v2)
Z(cuMemcpyHtoDAsync_v2) Z(cuMemcpyHtoD_v2) Z(cuMemsetD8Async) Z(cuModuleGetFunction)
Z(cuModuleGetGlobal) Z(cuModuleLoadData) Z(cuModuleUnload) Z(cuStreamAddCallback) Z(cuStreamCreate)
Z(cuStreamDestroy_v2) Z(cuStreamQuery) Z(cuStreamSynchronize) Z(cuStreamWaitEvent)
Z(cuTexObjectCreate) Z(cuTexObjectDestroy) Z(cuvidCreateVideoParser) Z(cuvidCreateVideoSource)
Z(cuvidCreateVideoSourceW) Z(cuvidCtxLock) Z(cuvidCtxLockCreate) Z(cuvidCtxLockDestroy)
Z(cuvidCtxUnlock) Z(cuvidDestroyVideoParser) Z(cuvidDestroyVideoSource) Z(cuvidGetDecodeStatus)
Z(cuvidGetSourceAudioFormat) Z(cuvidGetSourceVideoFormat) Z(cuvidGetVideoSourceState)
Z(cuvidMapVideoFrame) Z(cuvidParseVideoData) Z(cuvidReconfigureDecoder) Z(cuvidSetVideoSourceState)
Z(cuvidUnmapVideoFrame)
