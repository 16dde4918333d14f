"""Opens a web page that answers questions about photographs and rasters: `mfrsvlm app [MODEL]`."""

import sys

from ..arguments import ArgumentParser, add_loading_arguments
from ..demo import MODEL, SCENE


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="mfrsvlm app", description=__doc__.partition(":")[0] + ".")
    parser.add_argument("model", nargs="?", default=MODEL, help="model folder or Hub id (default: the small model)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: an accelerator if there is one)")
    add_loading_arguments(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)
    # Imported here: `--help` and wrong options need none of it.
    from ..evaluation.answering import load
    from .page import make_page

    try:
        model, processor = load(
            args.model,
            device=args.device,
            trust_remote_code=args.trust_remote_code,
            allow_incomplete=args.allow_incomplete,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    page = make_page(model, processor, args.model, SCENE if args.model == MODEL else None)
    page.launch(server_name=args.host, server_port=args.port)
    return 0


if __name__ == "__main__":
    sys.exit(main())
