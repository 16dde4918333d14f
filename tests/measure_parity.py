"""Compares a converted model with the numbers of the published implementation, stage by stage.

    python tests/measure_parity.py REFERENCE FOLDER [--json FILE]

REFERENCE holds images, manifest.json and golden.safetensors (`tests/reference`, or the full set it was cut from);
FOLDER is what the converter made of its checkpoint. The model is loaded the way a stranger would load it. Prints a table
of the largest error of every stage.
"""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor


# Stage: what the golden numbers call it, and the bound on the absolute error that it must keep.
BOUNDS = {
    "pixels": 1e-5,
    "vision hidden states": 2e-4,
    "detail stacks, before the projector": 2e-4,
    "detail stacks, projected": 2e-4,
    "visual tokens, projected": 2e-4,
    "router weights": 2e-4,
    "gates": 2e-4,
    "hidden states, before injection": 2e-4,
    "hidden states, after injection": 2e-4,
    "logits": 2e-4,
    "training loss": 1e-4,
    "gradient norms, relative": 1e-3,
    "gradients that cancel to zero, absolute": 1e-6,
}
BFLOAT16_BOUND = 1e-1
# Rows of each tensor that the committed part of the reference keeps (see tests/reference/README.md).
KEPT = {
    "logits_last32": (slice(-2, None),),
    "hidden_last32": (slice(None), slice(-2, None)),
    "hidden_first16": (slice(None), slice(0, 2)),
    "gate_first8": (slice(None), slice(0, 2)),
    "vision_hidden_stride36": (slice(None), slice(0, 2)),
    "global_projected": (slice(0, None, 96),),
    "detail_projected_stride16": (slice(None), slice(1, 2)),
    "detail_raw_full": (slice(None), slice(25, 576, 138)),
    "post_injection_first16": (slice(None), slice(0, 2)),
    "pixel_values": (slice(None), slice(None, None, 112)),
}
GRADIENT_NOISE = 1e-6  # a norm below this one is zero by construction


def stats(tensor):
    """Mean, population standard deviation, L2 norm and largest absolute value of a tensor."""
    flat = tensor.double().flatten()
    return torch.stack([flat.mean(), flat.std(correction=0), flat.norm(), flat.abs().max()]).float()


class Parity:
    def __init__(self, reference: Path, folder: Path):
        self.reference = reference
        self.manifest = json.loads((reference / "manifest.json").read_text())
        self.golden = load_file(reference / "golden.safetensors")
        self.model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        self.errors: dict[str, float] = {}
        self.greedy: dict[str, int] = {"steps": 0, "steps that differ": 0, "samples": 0}
        self.compared = 0

    def note(self, stage: str, error: float) -> None:
        self.errors[stage] = max(self.errors.get(stage, 0.0), float(error))
        self.compared += 1

    def compare(self, stage: str, key: str, actual: torch.Tensor) -> None:
        """Compares `actual`, laid out as the full golden tensor, with as much of it as the reference holds."""
        golden = self.golden.get(key)
        if golden is None:
            return
        if golden.shape != actual.shape:
            actual = actual[KEPT[key.split("/")[1]]]
        assert golden.shape == actual.shape, (key, golden.shape, actual.shape)
        self.note(stage, (golden - actual).abs().max())

    def compare_stats(self, stage: str, key: str, actual: torch.Tensor) -> None:
        """Statistics of whole tensors, per first index: relative for the L2 norm, which sums over everything."""
        golden = self.golden.get(key)
        if golden is None:
            return
        actual = torch.stack([stats(row) for row in actual]) if golden.ndim == 2 else stats(actual)
        error = (golden - actual).abs()
        error[..., 2] /= golden[..., 2].abs().clamp(min=1)
        self.note(stage, error.max())

    def words(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of the published vocabulary: the placeholder after it has none there, and never wins here."""
        assert (logits[..., self.processor.image_token_id :] < -9e3).all()
        return logits[..., : self.processor.image_token_id]

    def images(self, sample: dict) -> list[Image.Image]:
        names = sample.get("images") or ([sample["image"]] if "image" in sample else [])
        return [Image.open(self.reference / name) for name in names]

    def run_sample(self, name: str, sample: dict) -> None:
        images = self.images(sample)
        inputs = self.processor(images=images or None, text=sample["prompt"], return_tensors="pt")
        visual = [self.processor.image_token_id] * self.processor.image_processor.num_image_tokens * len(images)
        expected = visual + [token for token in sample["input_ids"] if token != -200]
        assert inputs["input_ids"][0].tolist() == expected, f"input ids of {name}"

        injectors = self.model.model.injectors
        routers, gates, injected = [], [], []
        hooks = []
        for injector in injectors:
            hooks.append(injector.router.register_forward_hook(lambda m, args, out: routers.append(out[0, 0])))
            hooks.append(
                injector.gate_proj.register_forward_hook(
                    lambda m, args, output: gates.append(output.sigmoid().flatten(0, 2))
                )
            )
            hooks.append(injector.register_forward_hook(lambda module, args, output: injected.append(output[0])))
        with torch.no_grad():
            outputs = self.model(**inputs, output_hidden_states=True)
        for hook in hooks:
            hook.remove()

        hidden = torch.stack(outputs.hidden_states)[:, 0]
        self.compare("hidden states, before injection", f"{name}/hidden_last32", hidden[:, -32:])
        logits = self.words(outputs.logits)[0]
        self.compare("logits", f"{name}/logits_last32", logits[-32:])
        self.compare_stats("hidden states, before injection", f"{name}/hidden_stats", hidden)
        self.compare_stats("logits", f"{name}/logits_stats", logits)
        if images:
            first = torch.stack([gate[:8] for gate in gates])
            self.compare("hidden states, before injection", f"{name}/hidden_first16", hidden[:, :16])
            self.compare("router weights", f"{name}/router_weights", torch.stack(routers))
            self.compare("gates", f"{name}/gate_first8", first)
            self.compare_stats("gates", f"{name}/gate_stats", torch.stack([gate.flatten() for gate in gates]))
            injected = torch.stack(injected)
            self.compare("hidden states, after injection", f"{name}/post_injection_first16", injected[:, :16])
            self.compare_stats("hidden states, after injection", f"{name}/post_injection_stats", injected)
        if len(images) == 1 and f"{name}/vision_hidden_stats" in self.golden:
            self.run_vision(name, inputs)

        for use_cache, key in ((True, "generated_ids_use_cache"), (False, "generated_ids_no_cache")):
            tokens = self.model.generate(**inputs, max_new_tokens=24, do_sample=False, use_cache=use_cache)
            self.compare_tokens(
                name, tokens[0, len(expected) :].tolist(), sample.get(key, sample["generated_ids_use_cache"])
            )

    def run_vision(self, name: str, inputs: dict) -> None:
        with torch.no_grad():
            features = self.model.get_image_features(inputs["pixel_values"], output_hidden_states=True)
            raw_details = self.model.model.get_detail_features(inputs["pixel_values"])[:, 0]
        hidden = torch.stack(features.hidden_states)[:, 0]
        details = torch.stack([stack[0] for stack in features.deepstack_features])
        side = self.model.config.image_size
        global_view = inputs["pixel_values"][0, : 3 * side**2].view(3, side, side)
        self.compare("pixels", f"{name}/pixel_values", global_view)
        self.compare_stats("pixels", f"{name}/pixel_stats", global_view)
        self.compare("vision hidden states", f"{name}/vision_hidden_stride36", hidden[:, ::36])
        self.compare_stats("vision hidden states", f"{name}/vision_hidden_stats", hidden)
        self.compare("visual tokens, projected", f"{name}/global_projected", features.pooler_output[0])
        self.compare("detail stacks, before the projector", f"{name}/detail_raw_full", raw_details)
        self.compare_stats("detail stacks, before the projector", f"{name}/detail_raw_stats", raw_details)
        self.compare("detail stacks, projected", f"{name}/detail_projected_stride16", details[:, 5::16])
        self.compare_stats("detail stacks, projected", f"{name}/detail_projected_stats", details)

    def compare_tokens(self, name: str, seen: list[int], expected: list[int]) -> None:
        """Greedy tokens must agree up to a step whose two best logits lie closer than the bound on logits."""
        margins = self.manifest["greedy_margins"].get(name, {}).get("margins", [1.0] * len(expected))
        self.greedy["samples"] += 1
        for step, (token, golden) in enumerate(zip(seen, expected, strict=True)):
            if token != golden and margins[step] > BOUNDS["logits"]:
                self.greedy["steps that differ"] += 1
            if token != golden:
                return
            self.greedy["steps"] += 1

    def run_training(self, name: str) -> None:
        """Loss and gradient norms. The tower is frozen as in the entry: it has gradients only where it was not."""
        entry = self.manifest[name]
        images = [Image.open(self.reference / image) for image in entry["images"]]
        pixels = self.processor.image_processor(images, return_tensors="pt")
        visual = self.processor.image_processor.num_image_tokens
        rows, labels, masks = [], [], []
        for ids, marks, mask in zip(entry["input_ids"], entry["labels"], entry["attention_mask"], strict=True):
            kept = [i for i, token in enumerate(ids) if token != -200]
            rows.append([self.processor.image_token_id] * visual + [ids[i] for i in kept])
            labels.append([-100] * visual + [marks[i] for i in kept])
            masks.append([1] * visual + [int(mask[i]) for i in kept])
        self.model.zero_grad()
        self.model.train()
        inputs = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks), **pixels}
        loss = self.model(**inputs, labels=torch.tensor(labels), use_cache=False).loss
        loss.backward()
        self.model.eval()
        self.note("training loss", abs(loss.item() - entry["loss"]))
        for key, norm in entry.get("grad_norms", {}).items():
            gradient = self.gradient(key)
            if norm is None or gradient is None:
                assert norm is None or "vision" in key, key
                continue
            seen = gradient.norm().item()
            if norm < GRADIENT_NOISE:
                self.note("gradients that cancel to zero, absolute", abs(seen - norm))
            else:
                self.note("gradient norms, relative", abs(seen - norm) / norm)
        for key, golden in self.golden.items():
            if key.startswith(f"grad_{name}/"):
                difference = (self.gradient(key.split("/")[1]) - golden).norm() / golden.norm()
                self.note("gradient norms, relative", difference)

    def gradient(self, key: str) -> torch.Tensor | None:
        """Gradient of the parameter that the published implementation calls `key`."""
        from mfrsvlm.released_layout import rename

        parameters = dict(self.model.named_parameters())
        if key == "model.deepstack_residual_scale":
            return torch.cat([injector.residual_scale.grad for injector in self.model.model.injectors])
        (name,) = rename(key, torch.empty(0))
        return parameters[name].grad

    def run(self) -> dict:
        for name, sample in self.manifest["samples"].items():
            self.run_sample(name, sample)
        for name in ("train_single", "train_single_vision_unfrozen", "train_batch2_right_padded"):
            self.run_training(name)
        return {"errors": self.errors, "greedy": self.greedy, "compared": self.compared, "bfloat16": self.run_bfloat16()}

    def run_bfloat16(self) -> float:
        """Distance of bfloat16 from float32 logits, relative to their norm: the largest over three samples."""
        samples = [self.manifest["samples"][name] for name in ("a_square_noise", "f_rgba", "text_only")]
        batches = [
            self.processor(images=self.images(sample) or None, text=sample["prompt"], return_tensors="pt")
            for sample in samples
        ]
        with torch.no_grad():
            full = [self.words(self.model(**batch).logits) for batch in batches]
            self.model.to(torch.bfloat16)
            half = [self.words(self.model(**batch.to(torch.bfloat16)).logits.float()) for batch in batches]
        return max(((a - b).norm() / a.norm()).item() for a, b in zip(full, half, strict=True))


def table(result: dict) -> str:
    lines = ["| stage | largest error | bound |", "|---|---|---|"]
    lines += [f"| {stage} | {result['errors'][stage]:.1e} | {bound:.0e} |" for stage, bound in BOUNDS.items()]
    greedy = result["greedy"]
    steps = greedy["steps"] + greedy["steps that differ"]
    lines.append(f"| greedy tokens that differ, of {steps} | {greedy['steps that differ']} | 0 |")
    lines.append(f"| distance of bfloat16 from float32 logits, relative | {result['bfloat16']:.1e} | {BFLOAT16_BOUND:.0e} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reference", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()
    torch.set_num_threads(1)  # threads that wait for each other cost more than they give at this size
    result = Parity(args.reference, args.folder).run()
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result))
