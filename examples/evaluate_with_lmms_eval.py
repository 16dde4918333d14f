"""Runs an image-text-to-text model in lmms-eval (pip install lmms-eval), with all options of its command line.

    python examples/evaluate_with_lmms_eval.py --model image_text_to_text \\
        --model_args pretrained=demo/model,trust_remote_code=True --tasks mme --batch_size 8 \\
        --output_path logs --log_samples

The `huggingface` model of lmms-eval loads MF-RSVLM with `AutoModel`, which has no `generate`. This one loads
`AutoModelForImageTextToText`. docs/evaluation.md explains how to run benchmarks of this package as tasks of lmms-eval, and
how to score the samples that it logs.
"""

from typing import Any

import torch
from lmms_eval.__main__ import cli_evaluate
from lmms_eval.api.model import lmms
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor


class ImageTextToText(lmms):
    """Answers the requests of lmms-eval, with greedy decoding unless a task asks for more.

    Args:
        pretrained: folder or Hub id of the model.
        device: such as "cuda"; by default the accelerator if there is one.
        dtype: such as "bfloat16"; as saved by default.
        batch_size: requests that are answered together.
        trust_remote_code: run code that comes with the model.
    """

    is_simple = False  # takes conversations and not single strings

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if device is None:
            device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
        self.batch_size = int(batch_size)
        self.processor = AutoProcessor.from_pretrained(pretrained, trust_remote_code=trust_remote_code)
        self.processor.tokenizer.padding_side = "left"
        model = AutoModelForImageTextToText.from_pretrained(pretrained, dtype=dtype, trust_remote_code=trust_remote_code)
        self.model = model.to(device).eval()

    def generate_until(self, requests: list[Any]) -> list[str]:
        answers: list[str] = []
        for start in tqdm(range(0, len(requests), self.batch_size)):
            batch = [request.args for request in requests[start : start + self.batch_size]]
            conversations = []
            for _, make_messages, _, doc_id, task, split in batch:
                messages = ChatMessages(messages=make_messages(self.task_dict[task][split][doc_id]))
                conversations.append(messages.to_hf_messages())
            answers += self.answer(conversations, batch[0][2])
        return answers

    @torch.inference_mode()
    def answer(self, conversations: list[Any], options: dict[str, Any]) -> list[str]:
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.model.device, self.model.dtype)
        known = {name: options[name] for name in ("max_new_tokens", "num_beams") if name in options}
        if options.get("do_sample"):
            known |= {name: options[name] for name in ("do_sample", "temperature", "top_p") if name in options}
        else:
            known["do_sample"] = False
        tokens = self.model.generate(**inputs, **known)[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        for stop in options.get("until") or []:
            texts = [text.split(stop)[0] for text in texts]
        return [text.strip() for text in texts]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("This model generates answers. Choose tasks with output_type generate_until.")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("This model answers one round. Choose tasks with output_type generate_until.")


if __name__ == "__main__":
    path = "evaluate_with_lmms_eval.ImageTextToText"  # this file, which Python finds beside the script that it runs
    MODEL_REGISTRY_V2.register_manifest(ModelManifest("image_text_to_text", chat_class_path=path))
    cli_evaluate()
