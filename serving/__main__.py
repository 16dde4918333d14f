"""Serves a model over HTTP, with the chat route of OpenAI: `mfrsvlm serve MODEL`.

    curl http://localhost:8000/v1/chat/completions -H "Content-Type: application/json" -d '{"messages": [...]}'

Images travel in the request, as `data:` URLs. The server has no access control: let it listen on `localhost` only, or put a
proxy with access control in front of it.
"""

import sys
from pathlib import Path

from ..arguments import ArgumentParser, add_dtype_argument, add_loading_arguments


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="mfrsvlm serve", description="Serves a model with the chat route of OpenAI.")
    parser.add_argument("model", help="model folder or Hub id")
    parser.add_argument("--name", help="name of the model in requests (default: the Hub id, or the name of the folder)")
    parser.add_argument("--host", default="localhost", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0: any (default: %(default)s)")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    add_dtype_argument(parser)
    parser.add_argument("--device", help="cpu, cuda, ... (default: an accelerator if there is one)")
    add_loading_arguments(parser)
    limits = parser.add_argument_group("limits of one request")
    limits.add_argument("--max-tokens", type=int, default=1024, help="generated tokens (default: %(default)s)")
    limits.add_argument("--max-images", type=int, default=8, help="images (default: %(default)s)")
    limits.add_argument("--max-mib", type=int, default=32, help="size of a request, MiB (default: %(default)s)")
    limits.add_argument("--max-requests", type=int, default=32, help="requests at the same time; more are answered with "
                        "status 503 (default: %(default)s)")  # fmt: skip
    limits.add_argument("--allow-fetch", action="store_true", help="fetch images from addresses in requests")
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)
    for option in ("max_tokens", "max_images", "max_mib", "max_requests"):
        if getattr(args, option) < 1:
            print(f"error: --{option.replace('_', '-')} must be positive, got {getattr(args, option)}", file=sys.stderr)
            return 2
    # Imported here: `--help` and wrong options need none of it.
    import uvicorn
    from transformers.utils import logging

    from ..evaluation.answering import load
    from .app import build_app
    from .chat_requests import Limits

    logging.disable_progress_bar()
    limits = Limits(
        max_body_bytes=args.max_mib * 2**20,
        max_images=args.max_images,
        max_tokens=args.max_tokens,
        allow_fetch=args.allow_fetch,
    )
    try:
        model, processor = load(
            args.model, args.revision, args.dtype, args.device, args.trust_remote_code, args.allow_incomplete
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    folder = Path(args.model)
    name = args.name or (folder.resolve().name if folder.is_dir() else args.model)
    app = build_app(model, processor, name, limits)
    uvicorn.run(app, host=args.host, port=args.port, limit_concurrency=args.max_requests, log_level="warning")
    return 0


if __name__ == "__main__":
    sys.exit(main())
