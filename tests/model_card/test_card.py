"""The card of a model folder: what it says comes from the cards of its parts, or from the caller."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import metadata_load
from tiny_parts import write_parts

from mfrsvlm import MFRSVLMConfig, MFRSVLMForConditionalGeneration
from mfrsvlm.training.assemble import assemble


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"))


class TestCard:
    """License and base models come from the cards of the parts; what they do not say is left out."""

    @pytest.mark.parametrize(
        "language_model, tower, expected",
        [
            ({"license": "mit"}, {"license": "mit"}, {"license": "mit"}),
            ({"license": "llama2"}, {"license": "mit"}, {}),  # the card's table has both
            ({"license": "mit"}, {}, {}),
            ({"license": "mit"}, None, {}),
            (
                {"license": "other", "license_name": "sam", "license_link": "LICENSE"},
                {"license": "other", "license_name": "sam", "license_link": "LICENSE"},
                {"license": "other", "license_name": "sam", "license_link": "LICENSE"},
            ),
            ({"license": "other", "license_name": "a"}, {"license": "other", "license_name": "b"}, {}),
            ({"base_model": "a/b"}, {"base_model": ["c/d", "a/b"]}, {"base_model": ["a/b", "c/d"]}),
            ({"license": "mit", "tags": "[unclosed"}, {"license": "mit"}, {}),
            (None, None, {}),
        ],
        ids=str,
    )
    def test_folders(self, parts: Path, tmp_path: Path, language_model, tower, expected: dict):
        paths = []
        for name, card in (("llama", language_model), ("clip", tower)):
            shutil.copytree(parts / name, tmp_path / name)
            paths.append(str(tmp_path / name))
            if card is not None:
                lines = [f"{key}: {value if key == 'tags' else json.dumps(value)}" for key, value in card.items()]
                (tmp_path / name / "README.md").write_text("---\n" + "\n".join(lines) + "\n---\n# A part\n")
        assemble(*paths, tmp_path / "output")
        data = metadata_load(tmp_path / "output" / "README.md")
        fields = ("license", "license_name", "license_link", "base_model")
        assert {field: data[field] for field in fields if field in data} == expected
        text = (tmp_path / "output" / "README.md").read_text()
        assert str(tmp_path) not in text  # a path means nothing to others
        for row, card in (("language model", language_model), ("vision tower", tower)):
            broken = card is None or "tags" in card
            stated = "unknown" if broken else card.get("license_name") or card.get("license") or "unknown"
            (line,) = [line for line in text.splitlines() if line.startswith(f"| {row} |") and line.count("|") == 4][:1]
            assert line.endswith(f"| {stated} |")

    def test_hub_ids(self, tmp_path: Path, monkeypatch):
        from mfrsvlm.model_card import card

        (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model: far/away\n---\n")

        def download(repo_id: str, filename: str) -> str:
            assert filename == "README.md"
            if repo_id == "no/card":
                raise FileNotFoundError(repo_id)
            return str(tmp_path / "README.md")

        monkeypatch.setattr(card, "hf_hub_download", download)
        for ids, expected in (
            (["a/b", "c/d"], {"license": "mit", "base_model": ["a/b", "c/d"]}),
            (["a/b", "no/card"], {"base_model": ["a/b", "no/card"]}),
        ):
            card.write_model_card(tmp_path, MFRSVLMConfig(), "assembled", parts=dict(zip(("one", "two"), ids, strict=True)))
            data = metadata_load(tmp_path / "README.md")
            assert {field: data[field] for field in ("license", "base_model") if field in data} == expected
            (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model: far/away\n---\n")

    @pytest.mark.parametrize("said", [{}, {"base_model": "mine/own"}])
    def test_derived(self, parts: Path, tmp_path: Path, said: dict):
        trainer = pytest.importorskip("mfrsvlm.training.trainer")
        assemble(str(parts / "llama"), str(parts / "clip"), tmp_path / "start")
        (tmp_path / "start" / "README.md").write_text("---\nlicense: mit\nbase_model: a/b\n---\n")
        model = MFRSVLMForConditionalGeneration.from_pretrained(tmp_path / "start")
        args = trainer.MFRSVLMTrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none")
        run = trainer.MFRSVLMTrainer(model=model, args=args)
        run.card_details = said
        (tmp_path / "run").mkdir(exist_ok=True)
        run.create_model_card()
        data = metadata_load(tmp_path / "run" / "README.md")
        assert (data["license"], data["base_model"]) == ("mit", said.get("base_model", "a/b"))

    def test_what_the_caller_says_wins(self, tmp_path: Path):
        from mfrsvlm.model_card.card import write_model_card

        write_model_card(tmp_path, MFRSVLMConfig(), "trained", license="mit", base_model="mine/own")
        data = metadata_load(tmp_path / "README.md")
        assert (data["license"], data["base_model"]) == ("mit", "mine/own")
        write_model_card(tmp_path, MFRSVLMConfig(), "trained")
        assert not {"license", "base_model"} & set(metadata_load(tmp_path / "README.md"))
