"""The `cvtrain` command: verb, help, checked config, hand-over to Hydra. Torch is imported only when a job runs."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvtrain import catalog, helptext
from cvtrain.core import launch
from cvtrain.errors import EXIT_OK, EXIT_SIGINT, ConfigError, CvtrainError, did_you_mean

if TYPE_CHECKING:
    from cvtrain.compose import Composer

LAST_TO_SPEAK_S = 5.0
PATHS = ("run", "resume", "weights", "source", "output", "distillation.teacher")


def main() -> None:
    """Run the command line and leave with its exit code."""
    # Threads that spin while they wait make a small model 10 to 15 times slower as soon as anything else runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if launch.world_size() > 1:  # else each process says what each knows of gradients and host names
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        code = run(sys.argv[1:])
    except CvtrainError as error:
        _print_error(str(error))
        code = error.exit_code
    except KeyboardInterrupt:
        code = EXIT_SIGINT
    except BrokenPipeError:  # `cvtrain list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_OK
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("hydra", "omegaconf", "yaml") and not isinstance(
            error, RecursionError
        ):
            raise
        _print_error(" ".join(str(error).split()) or type(error).__name__)
        code = ConfigError.exit_code
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.exit(code)


def run(argv: list[str]) -> int:
    """Run one command; return its exit code.

    Raises:
        CvtrainError: A failure with a known cause.
    """
    verb, rest = split_verb(argv)
    if "--version" in rest:
        from cvtrain import __version__

        sys.stdout.write(f"cvtrain {__version__}\n")
        return EXIT_OK
    if "--help" in rest or "-h" in rest:
        sys.stdout.write(helptext.verb_help(verb) if argv[0] == verb else helptext.overview())
        return EXIT_OK
    if verb == "list":
        sys.stdout.write(helptext.listing(*_folder_flag(rest)))
        return EXIT_OK
    return _hydra(verb, _folders_named(verb, rest))


def _folders_named(verb: str, words: list[str]) -> list[str]:
    """Let run folders stand by themselves behind the verbs that take them: `cvtrain report RUN1 RUN2`."""
    named = list(itertools.takewhile(lambda word: Path(word).is_dir(), words)) if verb not in ("train", "check") else []
    if not named:
        return words
    quoted = ["'" + name.replace("\\", "\\\\").replace("'", "\\'") + "'" for name in named]
    return [f"run={quoted[0] if len(quoted) == 1 else '[' + ','.join(quoted) + ']'}", *words[len(named) :]]


def _folder_flag(words: list[str]) -> tuple[list[str], Path | None]:
    for flag in ("-cd", "--config-dir"):
        if flag in words[:-1]:
            at = words.index(flag)
            return words[:at] + words[at + 2 :], Path(words[at + 1])
    return words, None


def split_verb(argv: list[str]) -> tuple[str, list[str]]:
    """Return the verb (`train` when none is given) and what follows it.

    Raises:
        ConfigError: The first word is neither a verb, an override nor a flag.
    """
    names = [*catalog.verbs(), "list"]
    if not argv or argv[0].startswith(("-", "+", "~")) or "=" in argv[0]:
        return "train", argv
    if argv[0] in names:
        return argv[0], argv[1:]
    raise ConfigError(f"unknown verb {argv[0]!r}; {did_you_mean(argv[0], names, 'verbs')}")


def _hydra(verb: str, argv: list[str]) -> int:
    from hydra import version
    from hydra._internal.utils import get_args_parser

    from cvtrain.compose import Composer, parse_flags, trusted_packages

    version.setbase("1.3")
    parser = get_args_parser()
    args = parse_flags(parser, argv)
    if args.experimental_rerun is not None or args.config_path is not None or args.config_name is not None:
        raise ConfigError(
            "--experimental-rerun, --config-path and --config-name are not supported; put your own YAML "
            "into a folder and add -cd FOLDER"
        )
    if args.shell_completion:
        return _hand_over(args, parser, verb, lambda config: None)
    composer = Composer(verb, args.config_dir)
    args.overrides = [_quoted_path(text) for text in args.overrides]
    overrides = composer.parse(args.overrides)
    trusted = trusted_packages(overrides)
    _make_importable(trusted, composer.extra)
    if args.cfg or args.info or args.hydra_help:
        return _show(composer, args, parser, verb, trusted)
    if args.multirun and verb != "train":
        raise ConfigError(f"-m sweeps trainings; cvtrain {verb} takes one run at a time: leave -m out.")
    if launch.world_size() > 1 and (verb != "train" or args.multirun):
        what = "a sweep (-m)" if args.multirun else f"cvtrain {verb}"
        raise ConfigError(f"{what} runs in one process; start it without torchrun.")
    swept = any(override.is_sweep_override() for override in overrides)
    if swept and not args.multirun:
        raise ConfigError("several values for one key start a multirun: add -m. For a list write key=[a,b].")
    composed, config = composer.check([] if swept else args.overrides, trusted)
    args.multirun |= verb == "train" and config["data"].get("folds") is not None and config["data"]["fold"] is None
    if args.multirun:
        from cvtrain.command import sweep

        return sweep.run(composer, args, parser, trusted)
    if verb == "train":
        from cvtrain.command import single

        return single.run(composed, config, args, parser, trusted)
    from cvtrain.command import run_verb

    return run_verb(verb, config, trusted)


def _show(composer: Composer, args: Any, parser: Any, verb: str, trusted: list[str]) -> int:  # noqa: ANN401 - argparse
    _, config = composer.check(args.overrides, trusted)
    if args.package is not None and args.package.split(".")[0] not in (*config, "hydra", "_global_"):
        raise ConfigError(
            f"--package {args.package} is not in the config; {did_you_mean(args.package, config, 'packages')}"
        )
    return _hand_over(args, parser, verb, lambda config: None)


def _hand_over(args: Any, parser: Any, verb: str, task: Any) -> int:  # noqa: ANN401 - argparse and Hydra's own types
    from cvtrain.command.handover import to_hydra

    return to_hydra(args, parser, verb, task)


def _make_importable(trusted: list[str], config_dir: Path | None) -> None:
    """Let a trusted package lie in the current folder, or in or beside the `-cd` one; installed ones come first."""
    if trusted:
        places = [Path.cwd(), *([config_dir, config_dir.parent] if config_dir else [])]
        sys.path.extend(str(place) for place in places if str(place) not in sys.path)


def _quoted_path(override: str) -> str:
    """Quote a path as it is printed and completed: a job's folder may be `lr=0.1,seed=2`, which is grammar to Hydra."""
    key, _, value = override.partition("=")
    listed = value.startswith("[")  # in a list the user quotes
    plain = key in PATHS and any(sign in value for sign in "=,() ") and not any(quote in value for quote in "'\"")
    return f"{key}='{value}'" if plain and not listed else override


def _print_error(message: str) -> None:
    if launch.rank() > 0:  # the first process says the same, and torchrun then ends this one
        time.sleep(LAST_TO_SPEAK_S)
    sys.stderr.write(f"cvtrain: {message}\n")
