"""Publishes a model folder, with the code that it needs and a card.

    python examples/push_to_hub.py FOLDER USER/NAME [--public]

Log in first: `hf auth login`. Others load the model with transformers and `trust_remote_code=True`, without this package.
`mfrsvlm finetune ... --push_to_hub true --hub_model_id USER/NAME` does the same right after training.
"""

import argparse
from pathlib import Path

from huggingface_hub import HfApi, ModelCard

from mfrsvlm.files.model_folder import load_model


def push(folder: str, repo_id: str, private: bool = True) -> str:
    """Uploads the model and returns the address of its commit.

    The model is loaded and saved again, so that other files in the folder are not uploaded, and an adapter is merged.
    """
    model, processor = load_model(folder)
    HfApi().create_repo(repo_id, private=private, exist_ok=True)
    processor.push_to_hub(repo_id)
    commit = model.push_to_hub(repo_id)
    card = Path(folder) / "README.md"
    if card.is_file():  # written by the training or the converter
        ModelCard.load(card).push_to_hub(repo_id)
    return str(commit)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Publishes a model folder.")
    parser.add_argument("folder")
    parser.add_argument("repo_id", metavar="USER/NAME")
    parser.add_argument("--public", action="store_true", help="for all to see; private by default")
    args = parser.parse_args()
    print(push(args.folder, args.repo_id, private=not args.public))
