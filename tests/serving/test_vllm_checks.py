"""What the plugin of vLLM refuses. Needs no vLLM: its settings are stand-ins here, and its own in `test_vllm.py`."""

import enum
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_models import tiny_config

from mfrsvlm.serving import vllm_plugin
from mfrsvlm.serving.vllm_plugin import Checks, check_engine, check_model


class Mode(enum.Enum):
    NONE = "none"
    PIECEWISE = "piecewise"
    FULL_AND_PIECEWISE = "full and piecewise"
    VLLM_COMPILE = "compile"
    STOCK_TORCH_COMPILE = "stock"

    def has_full_cudagraphs(self):
        return "full" in self.value


def engine(pipeline=1, micro_batches=1, pieces=1, lora=None, speculation=None, mode=None, graphs=None):
    parallel = SimpleNamespace(
        pipeline_parallel_size=pipeline,
        use_ubatching=micro_batches > 1,
        enable_dbo=False,
        ubatch_size=micro_batches,
        prefill_context_parallel_size=pieces,
    )
    return SimpleNamespace(
        parallel_config=parallel,
        lora_config=lora,
        speculative_config=speculation,
        compilation_config=SimpleNamespace(mode=mode, cudagraph_mode=graphs),
    )


def test_token_routing_and_models_without_injection_are_accepted():
    check_model(tiny_config(routing="token"), "inline")
    check_model(tiny_config(injection_layers=[], routing="stack"), "inline")


@pytest.mark.parametrize(
    "settings, placement, message",
    [
        ({"routing": "stack"}, "inline", "routing='stack' weighs the details of a whole image"),
        ({"injection_type": "cross_attention"}, "inline", "injection_type='cross_attention': vLLM has no cache"),
        ({"routing": "token"}, "prefix", "image_placement='prefix': vLLM puts visual tokens where"),
    ],
)
def test_other_models_are_refused(settings, placement, message):
    with pytest.raises(ValueError, match=message) as error:
        check_model(tiny_config(**settings), placement)
    assert "Use generate() or `mfrsvlm serve`." in str(error.value)


def test_a_released_model_is_refused_by_the_files_of_its_folder(converted):
    """The placement is a setting of the processor."""
    config = tiny_config(routing="token")
    with pytest.raises(ValueError, match="image_placement='prefix'"):
        Checks.verify_and_update_model_config(SimpleNamespace(model=str(converted), revision=None, hf_config=config))


@pytest.mark.parametrize("graphs", [None, Mode.NONE, Mode.PIECEWISE])
@pytest.mark.parametrize("mode", [None, Mode.NONE, Mode.VLLM_COMPILE])
def test_engines_that_keep_details_are_accepted(mode, graphs):
    check_engine(engine(mode=mode, graphs=graphs, speculation=SimpleNamespace(method="ngram")))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"pipeline": 2}, "pipeline_parallel_size=2: .* Use tensor_parallel_size"),
        ({"micro_batches": 2}, "ubatch_size=2, .* Leave it out"),
        ({"pieces": 4}, "prefill_context_parallel_size=4: .* Leave it out"),
        ({"lora": object()}, "enable_lora=True: .* Merge the adapter"),
        ({"speculation": SimpleNamespace(method="eagle3")}, "method='eagle3' is not supported. Use 'ngram'"),
        ({"mode": Mode.STOCK_TORCH_COMPILE}, "mode=STOCK_TORCH_COMPILE .* Use VLLM_COMPILE or NONE"),
        ({"graphs": Mode.FULL_AND_PIECEWISE}, "cudagraph_mode=FULL_AND_PIECEWISE .* Use PIECEWISE or NONE"),
    ],
)
def test_engines_that_would_lose_details_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_engine(engine(**settings))


def test_entry_point_names_the_plugin():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, function = project["entry-points"]["vllm.general_plugins"]["mfrsvlm"].split(":")
    assert module == vllm_plugin.__name__ and callable(getattr(vllm_plugin, function))
