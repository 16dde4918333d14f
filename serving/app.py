"""The web application: routes, limits and error messages around the chat handler of `transformers serve`.

`transformers serve` itself cannot load a model whose class is not part of transformers. It loads any model that a request
names, and answers most wrong requests with status 500. Here one model is loaded beforehand, see `files.model_folder`.
Requests are answered one after the other, since `generate` uses the whole device.
"""

import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import HTTPException
from fastapi.responses import JSONResponse, Response
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState, Modality

from ..files.reading import parse_json, shorten
from ..processing_mfrsvlm import MFRSVLMProcessor
from .chat_requests import BadRequest, Limits, check_request


logger = logging.getLogger(__name__)


class OneModel(ModelManager):
    """A model manager of transformers that holds one model, which is loaded already."""

    def __init__(self, model: Any, processor: Any, name: str) -> None:  # not the base's, which loads
        self.model, self.processor, self.force_model = model, processor, name

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return self.model, self.processor

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    @staticmethod
    def get_model_modality(*args: Any, **kwargs: Any) -> Modality:
        return Modality.VLM


class Generation(GenerateManager):
    """Generates on one thread, for one request after the other, and within the positions of the decoder."""

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        self._limit(model, inputs, config)
        return super().generate_streaming(model, processor.tokenizer, inputs, config, *args, **kwargs)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        self._limit(model, inputs, config)
        # The tokenizer, because `generate` looks for stop texts in its vocabulary.
        return await super().generate_non_streaming(model, processor.tokenizer, inputs, config, *args, **kwargs)

    @staticmethod
    def _limit(model: Any, inputs: Any, config: Any) -> None:
        length, positions = inputs["input_ids"].shape[-1], model.config.get_text_config().max_position_embeddings
        if length >= positions:
            raise ValueError(f"The prompt has {length} tokens, but the model has {positions} positions. Shorten it.")
        config.max_new_tokens = min(config.max_new_tokens, positions - length)


class OneThread(GenerationState):
    def __init__(self) -> None:
        super().__init__()
        self.generation = Generation()

    def get_manager(self, *args: Any, **kwargs: Any) -> Generation:
        return self.generation

    def shutdown(self) -> None:
        self.generation.stop()


class ChatHandler(ChatCompletionHandler):
    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        config = super()._build_generation_config(body, *args, **kwargs)
        if body.get("temperature"):  # the base leaves a greedy model greedy
            config.do_sample = True
        return config


def build_app(model: Any, processor: Any, name: str, limits: Limits | None = None, **template_options: Any) -> FastAPI:
    """The application for one model.

    Args:
        model: image-text-to-text model on its device, in eval mode.
        processor: its processor, with a chat template.
        name: the name that clients give in `model`.
        limits: what one request may ask for.
        **template_options: arguments of `processor.apply_chat_template` for every request.
    """
    limits = limits or Limits()
    if isinstance(processor, MFRSVLMProcessor):
        template_options.setdefault("sanitize_control_tokens", True)  # `</s>` in a question is text
    state = OneThread()
    handler = ChatHandler(OneModel(model, processor, name), state, chat_template_kwargs=template_options)
    started = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        state.shutdown()

    app = FastAPI(title="MF-RSVLM", openapi_url=None, lifespan=lifespan)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = check_request(read_json_body(await read_body(request, limits.max_body_bytes)), limits)
        return await handler.handle_request(body, str(uuid.uuid4()))

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": started, "owned_by": "mfrsvlm"}]}

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.exception_handler(ValueError)
    @app.exception_handler(TypeError)
    async def reject(request: Request, error: Exception) -> JSONResponse:
        """The processor rejects images and prompts with these errors."""
        if not isinstance(error, BadRequest):
            logger.warning("Rejected a request: %s", error)
        return error_response(400, str(error))

    @app.exception_handler(HTTPException)
    async def explain(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail))

    return app


def error_response(status: int, message: str) -> JSONResponse:
    """An error in the form of OpenAI's server."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a request. Reading stops at the limit.

    Raises:
        HTTPException: the body is longer, status 413.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise HTTPException(413, f"The request is larger than {limit / 2**20:g} MiB. Send smaller or fewer images.")
        parts.append(part)
    return b"".join(parts)


def read_json_body(content: bytes) -> Any:
    try:
        return parse_json(content.decode())
    except ValueError as error:  # also bytes that are not UTF-8
        raise BadRequest(f"The request is not JSON: {shorten(str(error))}.") from error
