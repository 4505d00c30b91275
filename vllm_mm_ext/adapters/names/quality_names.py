"""The names inside vLLM that the quality controller's statistics rely on."""

from __future__ import annotations

from vllm_mm_ext.adapters.names.attributes_check import VllmAttributes
from vllm_mm_ext.adapters.names.names_check import Checked, VllmName

STATISTICS_NAMES: tuple[Checked, ...] = (
    VllmName(
        "vllm.v1.metrics.loggers:AggregateStatLoggerBase.record", ("engine_idx",), passed_on=True
    ),
    VllmName("vllm.v1.metrics.loggers:AggregateStatLoggerBase.log_engine_initialized"),
    VllmAttributes(
        "vllm.v1.metrics.stats:SchedulerStats",
        (
            "kv_cache_usage",
            "num_running_reqs",
            "num_skipped_waiting_reqs",
            "num_waiting_reqs",
        ),
    ),
    VllmAttributes(
        "vllm.config:VllmConfig", ("model_config", "parallel_config", "scheduler_config")
    ),
    VllmAttributes("vllm.config:ParallelConfig", ("_api_process_count", "data_parallel_size")),
    VllmAttributes("vllm.config:SchedulerConfig", ("max_num_seqs",)),
)
