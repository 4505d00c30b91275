"""An engine with the settings of a written plan, asked for one request more than planned.

Run by ``test_plan_engine`` in a process of its own; prints JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from vllm_mm_ext.adapters.planning.planner import Planner, Wishes
from vllm_mm_ext.planner.gpu_facts import Site, gpu_of
from vllm_mm_ext.planner.plan_yaml import plan_yaml
from vllm_mm_ext.planner.workload import Image, Video, Workload
from vllm_mm_ext.plugin import register
from vllm_mm_ext.tools.bench.plan_engine import messages, serve_all, start_planned

CONCURRENCY = 4
QUESTION = "What happens in this video, and what do you hear?"


def main(model: Path, folder: Path) -> None:
    register()
    planner = Planner(str(model))
    text = len(planner.loaded.tokenizer.encode(QUESTION, add_special_tokens=False))
    workload = Workload(
        videos=(Video(5.0, fps=2.0, width=320, height=240, source_fps=10.0),),
        audios=(3.0,),
        images=(Image(300, 200),),
        text=text,
        output=40,
        concurrency=CONCURRENCY,
    )
    site = Site(gpu_of("cpu", 8 << 30), 1, 1, 8 << 30, 2, planner.process_bytes)
    plan = planner.plan(workload, site, Wishes())
    config = folder / "plan.yaml"
    kwargs = planner.mm_processor_kwargs
    config.write_text(
        plan_yaml(plan, command="plan", file_name=config.name, mm_processor_kwargs=kwargs)
    )
    llm = start_planned(config, folder)
    asked = [messages(workload, folder, QUESTION, seed) for seed in range(CONCURRENCY + 1)]
    served, recorded = serve_all(llm, asked, workload.output)
    planned: dict[str, list[int]] = {}
    for item in plan.request.items:
        planned.setdefault(item.modality, []).append(item.embeddings)
    print(
        json.dumps(
            {
                "fits": plan.fits,
                "planned": {
                    "prompt": plan.request.prompt,
                    "blocks": plan.blocks,
                    "items": planned,
                },
                "kv_blocks": plan.kv_blocks,
                "served": [asdict(one) for one in served],
                "recorded": asdict(recorded),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
