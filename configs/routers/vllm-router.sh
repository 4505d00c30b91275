#!/bin/sh
# vllm-router 0.1.17 before several vLLM servers with the plugin (docs/fleet.md):
#   configs/routers/vllm-router.sh --port 8000 --worker-urls http://127.0.0.1:8001 http://127.0.0.1:8002
# It takes the key from X-Session-ID. Without that header all chats go to one server.
# Its retries go to the same server, five within half a second, and help nobody.
# By default it ends a request after 30 minutes. Bodies past 512 MiB are a 413, as it holds them
# several times over.
exec vllm-router --policy consistent_hash --disable-retries --disable-circuit-breaker \
    --request-timeout-secs 3600 \
    --health-check-endpoint /mm_ext/health --health-check-interval-secs 5 "$@"
