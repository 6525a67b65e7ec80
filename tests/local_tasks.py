"""Tasks of lm-evaluation-harness with their data, of every kind of request that the harness makes."""

from __future__ import annotations

import json
from pathlib import Path

from finetune_runs import WORDS

SHARED = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
metadata:
  version: 1
"""
KINDS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: answer
doc_to_choice: choices
num_fewshot: 2
fewshot_split: test
fewshot_config:
  sampler: first_n
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "letter": """
output_type: multiple_choice
doc_to_text: "{{{{question}}}} A or B?"
doc_to_target: "{{{{answer % 2}}}}"
doc_to_choice: ["A", "B"]
metric_list:
  - metric: acc
""",
    "word": """
output_type: loglikelihood
doc_to_text: "{{{{text.split(' ')[:-1] | join(' ')}}}}"
doc_to_target: " {{{{text.split(' ')[-1]}}}}"
metric_list:
  - metric: perplexity
  - metric: acc
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
    "answer": """
output_type: generate_until
doc_to_text: "Repeat: {{{{text}}}}\\nRepeated:"
doc_to_target: "{{{{text}}}}"
generation_kwargs:
  until: ["\\n", "Repeat"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
""",
}


def write_tasks(folder: Path, n_docs: int = 8, data: str | None = None) -> dict[str, Path]:
    """Write the tasks and their data, which they call ``data``; return the YAML file of each."""
    docs = [
        {
            "question": f"Which word follows {WORDS[n % 9]}?",
            "choices": [WORDS[(n + k) % 10] for k in range(4)],
            "answer": n % 4,
            "text": " ".join(WORDS[(n * k + k) % 10] for k in range(1, 4 + 3 * n)),
        }
        for n in range(n_docs)
    ]
    path = folder / "docs.jsonl"
    path.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    paths = {}
    for name, text in KINDS.items():
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text(f"task: {name}\n" + (SHARED + text).format(data=data or path))
    return paths
