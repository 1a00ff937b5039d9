"""Where bi_compile holds on to vLLM. Each hook waits for a module's import, and wraps one thing in it."""

from __future__ import annotations

import dataclasses
import functools
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

from .keys import KEY

log = logging.getLogger("bi_compile")
_installed = False


def install() -> None:
    """Wait for vLLM's modules. Installing twice does nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    wrapt.register_post_import_hook(_wrap_config, "vllm.config.utils")
    half_imported = sys.modules.get("vllm.config.compilation")
    if half_imported is not None and "config" in vars(half_imported):
        # it reads the platform, which is what called us, between its imports and its class
        vars(half_imported)["config"] = sys.modules["vllm.config.utils"].config  # type: ignore[attr-defined]
    wrapt.register_post_import_hook(_wrap_vllm_config, "vllm.config.vllm")
    wrapt.register_post_import_hook(_wrap_worker, "vllm.v1.worker.worker_base")
    wrapt.register_post_import_hook(_wrap_ascend_compiler, "vllm_ascend.compilation.compiler_interface")


def check() -> None:
    """Say so if the configuration class was made before the hooks were there."""
    module = sys.modules.get("vllm.config.compilation")
    made = getattr(module, "CompilationConfig", None)
    if made is not None and KEY not in {f.name for f in dataclasses.fields(made)}:
        log.error(
            "bi_compile: vLLM made its CompilationConfig before bi_compile's platform plugin was called, so the key %r is not "
            "known and LLM(compilation_config={...}) drops it. Leave VLLM_TARGET_DEVICE unset, and name bi_compile in "
            "VLLM_PLUGINS if you set that.",
            KEY,
        )


def _wrap_config(module: ModuleType) -> None:
    """`@config` gives the class `CompilationConfig` one more field before it becomes a dataclass."""
    plain: Callable[..., Any] = vars(module)["config"]

    @functools.wraps(plain)
    def config(cls: type | None = None, **kwargs: Any) -> Any:
        if cls is None:
            return lambda c: config(c, **kwargs)
        if cls.__name__ == "CompilationConfig":
            _add_key(cls)
        return plain(cls, **kwargs)

    module.config = config  # type: ignore[attr-defined]


def _add_key(cls: type) -> None:
    cls.__annotations__[KEY] = list[str]
    setattr(cls, KEY, dataclasses.field(default_factory=list))
    before = cls.__post_init__  # type: ignore[attr-defined]

    @functools.wraps(before)
    def __post_init__(self: Any) -> None:
        before(self)
        if getattr(self, KEY):
            from .engine import check_names

            check_names(getattr(self, KEY))

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]


def _wrap(cls: type, method: str, around: Callable[..., Any]) -> None:
    """`cls.method(self, ...)` becomes `around(plain, self, ...)`."""
    plain = getattr(cls, method)

    @functools.wraps(plain)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(functools.partial(plain, self), self, *args, **kwargs)

    setattr(cls, method, run)


def _asked_for(vllm_config: Any) -> bool:
    return bool(getattr(vllm_config.compilation_config, KEY, None))


def _wrap_vllm_config(module: ModuleType) -> None:
    def post_init(plain: Callable[..., None], self: Any, *args: Any) -> None:
        asked = _asked_for(self)
        if asked:
            from .engine import before_config

            before_config(self)
        plain(*args)
        if asked:
            from .engine import configure

            configure(self)

    _wrap(module.VllmConfig, "__post_init__", post_init)


def _wrap_ascend_compiler(module: ModuleType) -> None:
    plain: Callable[..., None] = vars(module)["_configure_backend"]

    @functools.wraps(plain)
    def _configure_backend(config: Any, compilation: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        if not _asked_for(vllm_config):
            return plain(config, compilation, vllm_config, *args, **kwargs)
        from .ascend import configure_backend

        return configure_backend(plain, config, compilation, vllm_config, *args, **kwargs)

    module._configure_backend = _configure_backend  # type: ignore[attr-defined]


def _wrap_worker(module: ModuleType) -> None:
    wrapper = module.WorkerWrapperBase
    calls: dict[str, Callable[..., Any]] = {
        "init_worker": _in_turn,
        "init_device": _init_device,
        "load_model": _load_model,
        "determine_available_memory": _warm_up,
        "compile_or_warm_up_model": _compile_or_warm_up_model,
        "execute_model": _by_worker("execute_model"),
        "sample_tokens": _by_worker("sample_tokens"),
        "execute_dummy_batch": _in_turn,
        "shutdown": _shutdown,
    }
    for method, around in calls.items():
        if method not in vars(wrapper):
            # the wrapper hands every other method on to its worker
            setattr(wrapper, method, _to_worker(method))
        _wrap(wrapper, method, around)


def _to_worker(method: str) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: getattr(self.worker, method)(*args, **kwargs)


def _worker() -> ModuleType | None:
    """`bi_compile.vllm.worker`, if an engine in this process had the key so far."""
    return sys.modules.get(f"{__package__}.worker")


def _by_worker(function: str) -> Callable[..., Any]:
    """Around a method: `worker.function(plain, self, ...)`, or the method itself where no engine had the key."""

    def around(plain: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        worker = _worker()
        return plain(*args, **kwargs) if worker is None else getattr(worker, function)(plain, self, *args, **kwargs)

    return around


_in_turn = _by_worker("in_turn")


def _guarded(
    plain: Callable[..., Any], self: Any, *args: Any, around: Callable[..., Any] = _in_turn, **kwargs: Any
) -> Any:
    """Where an engine does not come up, nothing of it stays in the process."""
    try:
        return around(plain, self, *args, **kwargs)
    except BaseException:
        _release(self)
        raise


_warm_up = functools.partial(_guarded, around=_by_worker("warm_up"))


def _release(self: Any) -> None:
    worker = _worker()
    if worker is not None:
        worker.release(self)


def _init_device(plain: Callable[[], None], self: Any) -> None:
    if _asked_for(self.vllm_config):
        from . import worker

        worker.prepare(self)
    elif (others := _worker()) is not None:
        others.beside_others()
    _guarded(plain, self)


def _load_model(plain: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    result = _guarded(plain, self, *args, around=_by_worker("load_model"), **kwargs)
    if _asked_for(self.vllm_config):
        from . import worker

        _guarded(worker.check_model, self, self)
    return result


def _compile_or_warm_up_model(plain: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    result = _warm_up(plain, self, *args, **kwargs)
    if _asked_for(self.vllm_config):
        from . import worker

        _guarded(worker.report, self, self)
    return result


def _shutdown(plain: Callable[..., Any], self: Any) -> None:
    try:
        _in_turn(plain, self)
    finally:
        _release(self)
