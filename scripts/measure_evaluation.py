"""How fast lm-evaluation-harness scores our model, against its own ``hf`` model on the same weights.

python scripts/measure_evaluation.py --base checkpoints/smollm2-135m --json OUT.json
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_adapter.cli.command import command_parser, parse, run
from lit_adapter.data import demo
from lit_adapter.files.read import read_text
from lit_adapter.files.write import write_json

TASKS = {
    "choices": (
        "output_type: multiple_choice\n"
        'doc_to_text: "Turn the request into a JSON command.\\nRequest: {{request}}\\nCommand:"\n'
        "doc_to_target: answer\ndoc_to_choice: choices\n",
        ("acc", "acc_norm"),
    ),
    "short_choices": (
        "output_type: multiple_choice\n"
        'doc_to_text: "Request: {{request}}\\nKind of request:"\n'
        "doc_to_target: kind\ndoc_to_choice: kinds\n",
        ("acc", "acc_norm"),
    ),
    "five_shots": (
        "output_type: multiple_choice\n"
        'doc_to_text: "Request: {{request}}\\nKind of request:"\n'
        "doc_to_target: kind\ndoc_to_choice: kinds\n"
        "num_fewshot: 5\nfewshot_split: test\nfewshot_config: {sampler: first_n}\n",
        ("acc", "acc_norm"),
    ),
    "last_word": (
        "output_type: loglikelihood\n"
        "doc_to_text: \"{{request.split(' ')[:-1] | join(' ')}}\"\n"
        "doc_to_target: \" {{request.split(' ')[-1]}}\"\n",
        ("perplexity", "acc"),
    ),
    "text": (
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n',
        ("word_perplexity",),
    ),
    "answer": (
        'output_type: generate_until\ndoc_to_text: "Request: {{request}}\\nCommand:"\n'
        'doc_to_target: "{{choices[answer]}}"\ngeneration_kwargs: {until: ["\\n"], max_gen_toks: 32}\n',
        ("exact_match",),
    ),
}
"""Of every kind of request: the task without its data, and its metrics."""
PAGES = ("README.md", "docs/architecture.md", "docs/reliability.md", "docs/performance.md")
PIECE = 3000
"""Characters of a text whose likelihood is asked for."""


def main(argv: Sequence[str]) -> int:
    """Time every task with both models and compare their scores."""
    parser = command_parser("Speed of evaluation.")
    parser.add_argument("--base", type=str, default="checkpoints/smollm2-135m")
    parser.add_argument("--docs", type=int, default=40, help="questions of each task")
    parser.add_argument("--batch_size", type=int, default=16, help="of both models")
    parser.add_argument("--device", type=str, default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", type=str, required=True, help="where the rows go")
    args = parse(parser, argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        paths = write_tasks(Path(scratch), args.docs)
        print(
            "| task | hf, s | ours, s | hf / ours | of CPU time | largest relative difference |\n"
            "|---|---:|---:|---:|---:|---:|"
        )
        for name, row in measure(args, paths):
            rows.append({"task": name, **row})
            write_json(Path(args.json), rows)
            print(
                f"| {name} | {row['hf']:.1f} | {row['ours']:.1f} | {row['hf'] / row['ours']:.2f} "
                f"| {row['hf_cpu'] / row['ours_cpu']:.2f} | {row['difference']:.1e} |",
                flush=True,
            )
    return 0


def write_tasks(folder: Path, n_docs: int) -> dict[str, Path]:
    """Write the tasks and their data, which is made of the demo's requests and this project's pages."""
    records = demo.generate(0, 1, n_docs)[1]
    draw = random.Random(0)
    pages = "".join(map(read_text, map(Path, PAGES)))
    docs = []
    for number, record in enumerate(records):
        others = draw.sample([other["output"] for other in records if other is not record], 3)
        choices = [record["output"], *others]
        draw.shuffle(choices)
        text = pages[number * PIECE : (number + 1) * PIECE]
        answer = choices.index(record["output"])
        kinds = [kind.action.replace("_", " ") for kind in demo.KINDS]
        kind = kinds.index(json.loads(record["output"])["action"].replace("_", " "))
        docs.append(
            {
                "request": record["input"],
                "choices": choices,
                "answer": answer,
                "kinds": kinds,
                "kind": kind,
                "text": text,
            }
        )
    paths = {}
    for name, (text, metrics) in TASKS.items():
        mine = [doc for doc in docs if doc["text"]][: n_docs // 4] if name == "text" else docs
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(doc) + "\n" for doc in mine), encoding="utf-8")
        paths[name] = folder / f"{name}.yaml"
        listed = ", ".join(f"{{metric: {metric}}}" for metric in metrics)
        paths[name].write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
            f"test_split: test\n{text}metric_list: [{listed}]\n"
        )
    return paths


def measure(args: Any, paths: dict[str, Path]) -> Any:
    """Yield each task's name with the seconds of both models and the largest difference of a score."""
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    import lit_adapter
    from lit_adapter.evaluation.harness import HarnessModel

    loaded = lit_adapter.load(base=args.base, device=args.device, dtype=args.dtype)
    models = {
        "ours": HarnessModel(loaded, batch_size=args.batch_size),
        "hf": HFLM(args.base, device=args.device, dtype=args.dtype, batch_size=args.batch_size),
    }
    manager = TaskManager(include_defaults=False)
    for model in models.values():  # what the first call costs is not counted
        model.loglikelihood([Instance("loglikelihood", {}, ("Some words", " and more " * 300), 0)])
    for name, path in paths.items():
        row: dict[str, Any] = {"threads": torch.get_num_threads()}
        scores = {}
        for title, model in models.items():
            spent = _timed(model)
            found = simple_evaluate(model, tasks=[str(path)], task_manager=manager, bootstrap_iters=0)
            row[title], row[f"{title}_cpu"] = map(sum, zip(*spent, strict=True))
            scores[title] = found["results"][name]
        row["scores"] = {k: v for k, v in scores["ours"].items() if isinstance(v, float)}
        row["difference"] = max(
            abs(value - scores["hf"][key]) / (abs(value) or 1.0) for key, value in row["scores"].items()
        )
        yield name, row


def _timed(model: Any) -> list[tuple[float, float]]:
    """Return the list to which every call of the harness adds its seconds: of the clock, and of CPU time."""
    spent: list[tuple[float, float]] = []
    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        method = getattr(type(model), name)

        def timed(*given: Any, method: Any = method, **named: Any) -> Any:
            start, cpu = time.perf_counter(), time.process_time()
            result = method(model, *given, **named)
            spent.append((time.perf_counter() - start, time.process_time() - cpu))
            return result

        setattr(model, name, timed)
    return spent


if __name__ == "__main__":
    run(main)
