"""Runs a command of `geospatial` with the model without mistakes, slowly, until it is killed."""

import sys
import time

from tiny_assistants import PerfectAnswerer, perfect

from mfrsvlm.geospatial import GeoAssistant
from mfrsvlm.geospatial.commands import main


class SlowAnswerer(PerfectAnswerer):
    def answer(self, batch, encoded):
        time.sleep(0.2)
        return super().answer(batch, encoded)


if __name__ == "__main__":
    GeoAssistant.from_pretrained = classmethod(lambda cls, *args, **options: perfect(answerer=SlowAnswerer()))
    sys.exit(main(sys.argv[1:]))
