#!/bin/sh
# smg 1.13.0 before several vLLM servers with the plugin (docs/fleet.md):
#   configs/routers/smg.sh --port 8000 --worker-urls http://127.0.0.1:8001 http://127.0.0.1:8002
# With retries, smg keeps bodies below 1 MiB, and writes them anew without `uuid` and what else it
# does not know. Without, bodies pass byte for byte. With overload protection, a server with 8
# requests waiting would lose its keys. By default, a request ends after 30 minutes.
exec smg launch --backend vllm --policy consistent_hashing --routing-key-headers x-mm-key x-session-id \
    --disable-retries --disable-circuit-breaker --disable-worker-overload-protection \
    --disable-tokenizer-autoload --request-timeout-secs 3600 --max-payload-size 2147483648 \
    --health-check-endpoint /mm_ext/health --health-check-interval-secs 5 "$@"
