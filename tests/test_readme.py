"""The Python examples of the README run as they stand, one after the other, on a converted folder."""

import re
from pathlib import Path

from PIL import Image


README = Path(__file__).parents[1] / "README.md"


def test_python_examples_run(converted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    Image.radial_gradient("L").convert("RGB").save("scene.tif")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    namespace: dict = {}
    answers = 0
    for block in blocks:
        exec(block.replace("path/to/converted", str(converted)).replace("max_new_tokens=64", "max_new_tokens=4"), namespace)
        answers += 1 if "for prompt" not in block else len(namespace["questions"])
    assert len(capsys.readouterr().out.splitlines()) >= answers
    assert namespace["tokens"].shape[1] == namespace["inputs"]["input_ids"].shape[1] + 4
