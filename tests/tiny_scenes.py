"""A few scenes and an untrained model of the demo architecture."""

import numpy as np
import torch

from mfrsvlm.modeling_mfrsvlm import MFRSVLMForConditionalGeneration
from mfrsvlm.training.demo_model.architecture import make_config
from mfrsvlm.training.demo_model.scene_images import SceneImages, canvas_and_view, plan
from mfrsvlm.training.image_features import cache_image_features


SCENES = [plan("train", index) for index in range(4)]


class Drawn(SceneImages):
    """Scenes drawn in memory."""

    def __init__(self, scenes):
        self.scenes = scenes
        self.canvases, self.views = map(np.stack, zip(*map(canvas_and_view, scenes), strict=True))


def make_model(tokenizer, **overrides):
    torch.manual_seed(0)
    model = MFRSVLMForConditionalGeneration(make_config(len(tokenizer), **overrides)).eval()
    # Untrained features are nearly the same everywhere: larger weights make a mix-up visible.
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(20)
    return model


def encode(model, images, folder):
    return cache_image_features(model, images.batches(model.config), len(images), folder / "features.npy")
