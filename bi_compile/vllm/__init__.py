"""bi_compile in vLLM: `custom_passes` as a key of the compilation config.

    LLM(model, compilation_config={"custom_passes": ["bi_ascend"]}, additional_config={"bi_compile": {"on_unproven": "warn"}})
    vllm serve model --compilation-config '{"custom_passes": ["bi_ascend"]}'

vLLM calls the two entry points below in each of its processes. They hook these places and do nothing else until a
configuration has the key:

    vllm.config.utils.config                      `CompilationConfig` gets the field (`config_key`)
    vllm.config.vllm.VllmConfig.__post_init__     the pass goes into the configuration (`engine.configure`)
    WorkerWrapperBase.init_device                 kernels, settings and eager fallback go into the worker (`worker.prepare`)
    WorkerWrapperBase.load_model                  the model's attention is checked (`worker.check_model`)
    WorkerWrapperBase.compile_or_warm_up_model    the worker says what was rewritten and what is left (`worker.report`)
    WorkerWrapperBase.execute_model, .shutdown    workers of one process take turns, and give back what they hold (`worker.in_turn`)

What an engine needs on a platform stands in `cpu`, `cuda` and `ascend`.

When the last engine with the key is gone, or did not come up, the process is as it was (`shared`).
"""

from __future__ import annotations


def platform_plugin() -> None:
    """Entry point of `vllm.platform_plugins`: called before vLLM's configuration classes are made. No platform: None."""
    from . import hooks

    hooks.install()


def general_plugin() -> None:
    """Entry point of `vllm.general_plugins`: called in each process before an engine or a worker starts."""
    from . import hooks

    hooks.install()
    hooks.check()
