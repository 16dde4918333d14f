"""The read-outs of boxes along the way to the answer."""

import numpy as np
import pytest
import torch
from tiny_scenes import SCENES, Drawn, make_model

from mfrsvlm.experiments import SCENE_MODEL as MODEL
from mfrsvlm.experiments import box_readout
from mfrsvlm.training.branches import BranchCollator
from mfrsvlm.training.demo_model.architecture import make_processor, make_tokenizer
from mfrsvlm.training.demo_model.scene_images import SCENE_SIZE
from mfrsvlm.training.demo_model.scene_questions import dialogues


def test_states_are_read_at_the_object():
    tokenizer = make_tokenizer(dialogues(SCENES))
    model = make_model(tokenizer)
    side, scale, depths = model.config.tokens_per_side, model.config.canvas_scale, 2
    shape = (len(SCENES), 1 + depths * scale**2, side**2)
    features = np.broadcast_to(np.arange(np.prod(shape[1:])).reshape(1, *shape[1:], 1), (*shape, 128)).astype(np.float32)
    collator = BranchCollator(make_processor(model.config, tokenizer))
    states, boxes, cells, phases = box_readout.read_states(model, Drawn(SCENES), collator, features)
    assert len(boxes) == sum(1 in scene.counts.values() for scene in SCENES) > 0
    cell, phase = SCENE_SIZE / side, SCENE_SIZE / side / scale
    for seen, (x, y, _, _), corner, finer in zip(states["encoder"], boxes, cells, phases, strict=True):
        for depth, value in enumerate(seen[::128].astype(int)):
            stack, token = divmod(value, side**2)
            row, column = divmod((stack - 1) % scale**2, scale)
            assert (stack - 1) // scale**2 == depth
            found = np.array([token % side * cell + column * phase, token // side * cell + row * phase])
            assert np.array_equal(found, finer) and np.all(found <= [x, y]) and np.all([x, y] < found + phase)
        assert np.all(corner <= [x, y]) and np.all([x, y] < corner + cell)
    # Before the first layer, a visual token is the projected view at its place.
    encoded = box_readout.project(model, torch.from_numpy(features[:1])).pooler_output[0].detach().numpy()
    tokens = (cells @ [1, side] / cell).astype(int)
    np.testing.assert_allclose(states["visual token, layer 0"], encoded[tokens], atol=1e-5)


def test_boxes_are_compared_as_center_and_size():
    truths = np.array([[10.0, 10, 8, 8], [50, 50, 8, 8]])
    moved = truths + np.array([[0, 0, 0, 0], [4, 0, 0, 0]])  # half of each box in common: a third of the union
    found = box_readout.compare(moved, truths)
    assert found["correct"][0] == 0.5 and found["error"] == 2.0


def test_models_of_one_name_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        box_readout.main(["a/model", "b/model", "--work", str(tmp_path), "--table", str(tmp_path / "table.md")])
    assert "a/model, b/model must have different names" in capsys.readouterr().err


@pytest.mark.integration
def test_command_writes_a_table(tmp_path):
    counts = ["--train-scenes", "8", "--validation-scenes", "4"]
    box_readout.main([str(MODEL), "--work", str(tmp_path), "--table", str(tmp_path / "table.md"), *counts])
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0].startswith("| read from | scene_model, IoU") and lines[2].startswith("| encoder |")
    assert lines[-1].startswith("| answer |") and len(lines) == 2 + 1 + 2 * 7 + 1
