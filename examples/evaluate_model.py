"""Evaluates a model in memory on synthetic scenes, with and without their images.

    python examples/evaluate_model.py [MODEL_FOLDER_OR_HUB_ID] [LIMIT]

The model may come from anywhere: just trained, merged, quantized. For a benchmark with files, write
`load_benchmark("rsvqa-lr", "data/RSVQA-LR")` in place of `"scenes"`. Two caption metrics of the protocol "strict" need Java.
"""

import sys
from typing import Any

from mfrsvlm.demo import MODEL
from mfrsvlm.evaluation import EvaluationSettings, evaluate
from mfrsvlm.files.model_folder import load_model


def main(name: str = MODEL, limit: int = 200, protocol: str = "strict-without-java") -> dict[str, dict[str, Any]]:
    model, processor = load_model(name)
    summaries = {}
    for blind in (False, True):
        settings = EvaluationSettings(limit=limit, blind=blind, progress=False)
        summary = evaluate(model, processor, ["scenes"], protocol=protocol, settings=settings)["scenes/test"]
        print("without images" if blind else "with images")
        for task, figures in summary["results"].items():
            for figure, cell in figures.items():
                if "value" in cell:
                    value, low, high, n = (cell[key] for key in ("value", "low", "high", "n"))
                    print(f"  {task:<16}{figure:<18}{value:.3f}  [{low:.3f}, {high:.3f}]  n={n}")
        summaries["blind" if blind else "image"] = summary
    return summaries


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
