"""A small byte-level BPE tokenizer with a family's real special tokens, and its chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# ChatML control tokens, shared by every supported family.
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_CORPUS = (
    "system user assistant You are a helpful assistant.",
    "What happens in this video? Describe the image. What do you hear in the audio?",
    "the ball moves from left to right and then the scene changes after a few seconds",
    "a red square, a green circle, a blue line; 0 1 2 3 4 5 6 7 8 9 <1.5 seconds>",
)


def make_tokenizer(
    tokens: Sequence[str], *, vocab_size: int, named: Mapping[str, str], chat_template: str
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: any text round-trips, every special token is one id.

    Args:
        tokens: The family's own special tokens (ChatML's are always there).
        vocab_size: Size of the vocabulary, special tokens included.
        named: Attribute name to token for the attributes the family's processor reads
            (``image_token``, ``audio_bos_token``...).
        chat_template: Jinja chat template.
    """
    special = [*CHATML, *tokens]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        raise ValueError(f"vocab_size {vocab_size} < {len(alphabet) + len(special)}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=sorted(alphabet)
    )
    bpe.train_from_iterator(_CORPUS, trainer)
    # A small corpus runs out of merges; ids up to vocab_size must all decode to something.
    missing = vocab_size - bpe.get_vocab_size()
    bpe.add_tokens([f"~{i}" for i in range(missing)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special[1:],
        extra_special_tokens=dict(named),
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def chatml_template(
    *, image: str = "", video: str = "", audio: str = "", system: str | None = None
) -> str:
    """ChatML template that replaces media parts by a family's placeholders, in order.

    Args:
        image, video, audio: What stands for one media part of that kind; empty: not supported,
            the part is dropped. ``{n}`` in ``audio`` becomes the running number of the part.
        system: Default system prompt when a conversation has none.
    """
    number = "{%- set audio_count.n = audio_count.n + 1 %}" if "{n}" in audio else ""
    audio = audio.replace("{n}", "{{ audio_count.n }}")
    preamble = ""
    if system is not None:
        preamble = (
            "{%- if loop.first and message['role'] != 'system' %}"
            f"{{{{- '<|im_start|>system\\n{system}<|im_end|>\\n' }}}}"
            "{%- endif %}"
        )
    return (
        "{%- set audio_count = namespace(n=0) %}"
        "{%- for message in messages %}"
        f"{preamble}"
        "{{- '<|im_start|>' + message['role'] + '\\n' }}"
        "{%- if message['content'] is string %}{{- message['content'] }}{%- else %}"
        "{%- for part in message['content'] %}"
        "{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
        f"{{{{- '{image}' }}}}"
        "{%- elif part['type'] == 'video' or 'video' in part %}"
        f"{{{{- '{video}' }}}}"
        "{%- elif part['type'] == 'audio' or 'audio' in part or 'audio_url' in part %}"
        f"{number}{_concatenated(audio)}"
        "{%- elif 'text' in part %}{{- part['text'] }}{%- endif %}"
        "{%- endfor %}{%- endif %}"
        "{{- '<|im_end|>\\n' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )


def _concatenated(text: str) -> str:
    before, variable, after = text.partition("{{ audio_count.n }}")
    if not variable:
        return f"{{{{- '{text}' }}}}"
    return f"{{{{- '{before}' + (audio_count.n | string) + '{after}' }}}}"
