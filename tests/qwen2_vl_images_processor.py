"""Qwen2-VL's processor for images only: its own wants a video processor, and that wants torchvision."""

from transformers import ProcessorMixin, Qwen2VLProcessor


class Qwen2VLImagesProcessor(Qwen2VLProcessor):
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
