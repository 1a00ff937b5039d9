"""Where bi_compile holds on to vLLM. Each hook waits for a module's import, and wraps one thing in it."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

from ..errors import HostError
from .keys import HOOKED, KEY, NEWEST, OLDEST

log = logging.getLogger("bi_compile")
_installed = False
#: `module.name` that this vLLM does not have -> nothing of ours works, and the key is refused
_missing: list[str] = []


def install() -> None:
    """Wait for vLLM's modules. Installing twice does nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    wrapt.register_post_import_hook(_wrap_is_init_field, "vllm.config.utils")
    _when_imported("vllm.config.utils", _wrap_config)
    half_imported = sys.modules.get("vllm.config.compilation")
    if half_imported is not None and "config" in vars(half_imported):
        # it reads the platform, which is what called us, between its imports and its class
        vars(half_imported)["config"] = sys.modules["vllm.config.utils"].config
    _when_imported("vllm.config.vllm", _wrap_vllm_config)
    _when_imported("vllm.v1.worker.worker_base", _wrap_worker)
    _when_imported("vllm_ascend.compilation.compiler_interface", _wrap_ascend_compiler)


def _when_imported(name: str, wrap: Callable[[ModuleType], None]) -> None:
    """`wrap(module)`, once the module of that name is imported and has what is wrapped in it; where it has not, vLLM is left alone."""

    def hook(module: ModuleType) -> None:
        absent = _absent(module)
        if absent:
            _missing.extend(absent)
            log.error("bi_compile: %s", _does_not_fit())
        else:
            wrap(module)

    wrapt.register_post_import_hook(hook, name)


def _absent(module: ModuleType) -> list[str]:
    name = module.__name__
    return [f"{name}.{what}" for what in HOOKED.get(name, ()) if not _has(module, what)]


def _has(module: ModuleType, what: str) -> bool:
    found: Any = module
    for part in what.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def _does_not_fit() -> str:
    return (
        f"this vLLM does not have {', '.join(_missing)}, which bi_compile hooks: {KEY} cannot be used with it. Supported are {OLDEST} up "
        f"to, without, {NEWEST}; without the key nothing changes"
    )


def refuse_if_missing() -> None:
    """Called where the key is used.

    Raises:
        HostError: this vLLM lacks something that is hooked.
    """
    for name in HOOKED:
        try:
            absent = _absent(importlib.import_module(name))
        except ImportError:
            absent = [name]
        _missing.extend(what for what in absent if what not in _missing)
    if _missing:
        raise HostError(_does_not_fit())


_MADE_TOO_EARLY = (
    f"vLLM made its CompilationConfig before bi_compile's platform plugin was called, so the key {KEY!r} is not known and "
    "LLM(compilation_config={...}) would drop it. Leave VLLM_TARGET_DEVICE unset, and name bi_compile in VLLM_PLUGINS if you set that."
)


def check() -> None:
    """Say so if the configuration class was made before the hooks were there."""
    if not _missing and not _key_is_known():
        log.error("bi_compile: %s", _MADE_TOO_EARLY)


def _key_is_known() -> bool:
    """Also where the class is not made yet."""
    made = getattr(sys.modules.get("vllm.config.compilation"), "CompilationConfig", None)
    return made is None or KEY in {f.name for f in dataclasses.fields(made)}


def _wrap_is_init_field(module: ModuleType) -> None:
    """By it `LLM` finds the keys that `CompilationConfig` does not have, which it drops without a word; not ours."""
    plain: Callable[[type, str], bool] | None = getattr(module, "is_init_field", None)
    if plain is None:
        return

    @functools.wraps(plain)
    def is_init_field(cls: type, name: str) -> bool:
        if name == KEY and not _key_is_known():
            raise HostError(_does_not_fit() if _missing else _MADE_TOO_EARLY)
        return plain(cls, name)

    module.is_init_field = is_init_field  # type: ignore[attr-defined]


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
    before: Callable[[Any], None] = getattr(cls, "__post_init__", lambda self: None)

    @functools.wraps(before)
    def __post_init__(self: Any) -> None:
        before(self)
        if getattr(self, KEY):
            refuse_if_missing()
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
        "reload_weights": _in_turn,
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
