"""Target: how the command line names a workload: ``file.py``, ``file.py:name``, ``package.module:name`` or a directory
of pretrained weights, with ``name=value`` arguments.

A target is plain text, so it crosses to other processes, each of which loads the workload itself.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from weft.errors import TargetError, WeftError
from weft.inference import pretrained
from weft.workload import Workload

DEFAULT_NAME = "workload"
TRUE, FALSE = ("true", "yes", "1"), ("false", "no", "0")


@dataclass(frozen=True)
class Target:
    """A workload function and the arguments to call it with, as text.

    Attributes:
        file: path of a Python file, or the name of a module that can be imported, or a directory that holds a
            transformers model (``config.json`` and safetensors), whose arguments are ``pretrained.target_of``'s.
        name: of the function in it.
        arguments: name to text; ``load`` converts each to the type of the function's parameter.
    """

    file: str
    name: str = DEFAULT_NAME
    arguments: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, arguments: Mapping[str, str] | None = None) -> Target:
        """Read ``file.py``, ``file.py:name`` or ``package.module:name``."""
        file, colon, name = text.rpartition(":")
        if not colon or (len(file) == 1 and name.startswith(("\\", "/"))):  # C:\file.py
            file, name = text, DEFAULT_NAME
        if not file or not name.isidentifier():
            raise TargetError(f"TARGET {text!r} is not file.py, file.py:name or package.module:name")
        return cls(file, name, dict(arguments or {}))

    def load(self) -> Workload:
        """Import the file, call the function, return its workload.

        Raises:
            TargetError: it is missing, has no such function, was given an argument that it does not take or that
                cannot be read, raised, or returned something else.
        """
        function = self._function()
        values = self._values(function)
        try:
            workload = function(**values)
        except WeftError:
            raise  # it names the remedy itself
        except (Exception, SystemExit) as error:  # the user's code: whatever it raises is told in one line
            raise self._raised(error, f"{self.name}() raised") from error
        if not isinstance(workload, Workload):
            raise TargetError(
                f"{self}: {self.name}() returned {type(workload).__name__}; it must return a weft.Workload"
            )
        return workload

    def taking(self, path: Path) -> Target:
        """This target with its data from a file, which its function takes as ``input``.

        Raises:
            TargetError: there is no such file, or the function takes none.
        """
        if not path.exists():
            raise TargetError(f"--input {path}: no such file")
        if "input" not in self._parameters(self._function()):
            raise TargetError(
                f"{self}: {self.name}() takes no input; give it a parameter `input: str` and make its data of that "
                "file, or leave --input out"
            )
        if "input" in self.arguments:
            raise TargetError(f"--input {path} and input={self.arguments['input']} say the same; leave one of them out")
        return replace(self, arguments={**self.arguments, "input": str(path)})

    def beside(self, name: str) -> Any | None:
        """What another function of the same file returns, given those of the arguments that it takes; None where there
        is none of this name.

        Raises:
            TargetError: it raised.
        """
        if (Path(self.file) / pretrained.CONFIG).is_file():
            return pretrained.beside(Path(self.file), name)
        function = vars(self._module_of()).get(name)
        if not inspect.isfunction(function):
            return None
        taken = {k: text for k, text in self.arguments.items() if k in self._parameters(function)}
        values = Target(self.file, name, taken)._values(function)
        try:
            return function(**values)
        except WeftError:
            raise  # it names the remedy itself
        except (Exception, SystemExit) as error:  # the user's code: whatever it raises is told in one line
            raise self._raised(error, f"{name}() raised") from error

    def __str__(self) -> str:
        return self.file if self.name == DEFAULT_NAME else f"{self.file}:{self.name}"

    def _function(self) -> Callable[..., Any]:
        if (Path(self.file) / pretrained.CONFIG).is_file():
            return pretrained.target_of(Path(self.file))
        module = self._module_of()
        function = vars(module).get(self.name)
        if function is None:
            functions = [name for name, value in vars(module).items() if inspect.isfunction(value)]
            near = difflib.get_close_matches(self.name, functions, n=1)
            hint = f"; did you mean {self.file}:{near[0]}?" if near else ""
            raise TargetError(
                f"{self.file} has no function {self.name!r}{hint or f'; define `def {self.name}() -> weft.Workload`'}"
            )
        if not callable(function):
            raise TargetError(
                f"{self.file}: {self.name} is a {type(function).__name__}, not a function that returns a weft.Workload"
            )
        return typing.cast(Callable[..., Any], function)

    def _module_of(self) -> types.ModuleType:
        return self._file_module() if self.file.endswith(".py") else self._module()

    def _file_module(self) -> types.ModuleType:
        """Import the file under its own name, once per process, with its neighbours importable."""
        path = Path(self.file).resolve()
        if not path.is_file():
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=1)
            hint = f"did you mean {Path(self.file).parent / near[0]}?" if near else "give the path of a Python file"
            raise TargetError(f"{self.file}: no such file; {hint}")
        loaded = sys.modules.get(path.stem)
        if loaded is not None and getattr(loaded, "__file__", None) == str(path):
            return loaded
        # A file called like a module that is imported already (test.py, say) keeps out of its way.
        name = path.stem if loaded is None and path.stem.isidentifier() else f"weft_target_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        sys.modules[name] = module  # dataclasses and pickle look a class's module up while it is being made
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # the user's code: whatever it raises is told in one line
            del sys.modules[name]
            raise self._raised(error, "importing it raised") from error
        return module

    def _module(self) -> types.ModuleType:
        try:
            return importlib.import_module(self.file)
        except ModuleNotFoundError as error:
            if error.name is None or not self.file.startswith(error.name):
                raise self._raised(error, "importing it raised") from error
            raise TargetError(
                f"{self.file}: no module of this name can be imported; for a file, write its path with .py; a "
                "directory of pretrained weights needs a config.json"
            ) from error
        except (Exception, SystemExit) as error:  # the user's code: whatever it raises is told in one line
            raise self._raised(error, "importing it raised") from error

    def _values(self, function: Callable[..., Any]) -> dict[str, Any]:
        """The arguments, converted by the parameters' annotations, or by their defaults where there is none."""
        parameters = self._parameters(function)
        try:
            hints = typing.get_type_hints(function)
        except Exception:  # annotations are the user's code too: names that only type checkers import, or no types
            hints = {}
        named = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
        values: dict[str, Any] = {}
        for name, text in self.arguments.items():
            if name not in named and not takes_any:
                near = difflib.get_close_matches(name, named, n=1)
                takes = f"it takes {', '.join(named)}" if named else "it takes no arguments"
                hint = f"did you mean {near[0]}={text}?" if near else takes
                raise TargetError(f"{self}: {self.name}() has no argument {name!r}; {hint}")
            default = parameters[name].default if name in named else inspect.Parameter.empty
            values[name] = self._convert(name, text, hints.get(name), default)
        required = [n for n in named if parameters[n].default is inspect.Parameter.empty and n not in values]
        if required:
            raise TargetError(f"{self}: {self.name}() needs a value for {required[0]}; add {required[0]}=VALUE")
        return values

    def _parameters(self, function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
        try:
            return inspect.signature(function).parameters
        except (TypeError, ValueError) as error:  # of builtin functions
            raise TargetError(f"{self}: {self.name} does not say what it takes; give a function of yours") from error

    def _convert(self, name: str, text: str, hint: Any, default: Any) -> Any:
        kinds = _kinds(hint, default)
        for kind in kinds:
            try:
                return _read(text, kind)
            except ValueError:
                continue
        expected = " or ".join(kind.__name__ for kind in kinds)
        example = {bool: "true", int: "4", float: "0.5", str: "text"}.get(kinds[-1], "4")
        raise TargetError(f"{self}: {name}={text} is not of type {expected}; write for example {name}={example}")

    def _raised(self, error: BaseException, what: str) -> TargetError:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")]
        path = str(Path(self.file).resolve())
        own = [f for f in frames if f.filename == path] or frames
        if isinstance(error, SyntaxError):
            where = f" ({error.filename}:{error.lineno})"
        else:
            where = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
        text = " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
        return TargetError(f"{self}: {what} {type(error).__name__}{': ' if text else ''}{text}{where}")


def _kinds(hint: Any, default: Any) -> list[type]:
    """The types a parameter takes, most particular first."""
    if hint is None and default is not inspect.Parameter.empty:
        hint = type(default)
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    order = [type(None), bool, int, float, str]
    found = [kind for kind in order if kind in options]
    return found if any(kind is not type(None) for kind in found) else [str]


def _read(text: str, kind: type) -> Any:
    """A value of a type.

    Raises:
        ValueError: the text is not one.
    """
    if kind is bool:
        if text.lower() in TRUE + FALSE:
            return text.lower() in TRUE
        raise ValueError(text)
    if kind is type(None):
        if text.lower() == "none":
            return None
        raise ValueError(text)
    return kind(text)
