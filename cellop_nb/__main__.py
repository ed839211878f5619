"""The command line: `python3 -m cellop_nb run | test | lab | predict | holdout | ...`.

Standard library only until the environment exists, so that a fresh machine needs nothing but Python and git; and what
an old Python cannot read is imported after it was refused.
"""

from __future__ import annotations

import argparse
import errno
import re
import sys
from importlib import import_module
from itertools import takewhile

_DESCRIPTION = """\
Learn what perturbations do to single cells, in notebooks.
The first command sets up .venv, once; an active environment that has everything is used instead."""
_EPILOG = """\
examples:
  python3 -m cellop_nb run                                     the notebooks on the embedded screen
  python3 -m cellop_nb run --data screen.h5ad --control DMSO   the same on your counts
  python3 -m cellop_nb run --only 02 -p latent_dim 16          one notebook with another value
  python3 -m cellop_nb params 02                               what can be changed there
  python3 -m cellop_nb sweep 02 -g latent_dim=8,16 -g seed=0..4   ten runs of it, compared
  python3 -m cellop_nb predict --data screen.h5ad --context "CD14 Mono" --perturbation IFNb
                                                               the verdict and the leading genes
  python3 -m cellop_nb holdout screen.h5ad --over donor        predict every donor, beside baselines
  python3 -m cellop_nb test science                            the tests that need no notebook
  python3 -m cellop_nb test -- -k energy                       some of the tests"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints say what was expected, what was found and how to fix it."""

    def error(self, message: str):
        from cellop_nb.errors import three_beats

        fix = f"see `{self.prog} --help`"
        suggestion = self._suggest(message)
        self.exit(2, three_beats(f"arguments of {self.prog}", message, f"{suggestion} {fix}".strip()) + "\n")

    def _suggest(self, message: str) -> str:
        from cellop_nb.errors import did_you_mean

        unknown = re.search(r"unrecognized arguments: (\S+)|invalid choice: '([^']*)'", message)
        if not unknown:
            return ""
        options = [option for option in self._option_string_actions if option.startswith("--")]
        if unknown[2]:
            options = [choice for action in self._actions for choice in action.choices or ()]
        suggestion = did_you_mean(unknown[1] or unknown[2], options)
        passed_on = next((a.help for a in self._actions if "-- " in str(a.metavar)), None)
        if unknown[1] and passed_on and not suggestion.startswith("did you mean"):
            suggestion = f"write -- {unknown[1]} for what is {str(passed_on).partition(',')[0]}"
        return suggestion + ";"

    def parse_args(self, args, namespace=None):
        """Parse; an unknown option, or one that is there twice, is reported by the subcommand it was given to."""
        parsed, rest = self.parse_known_args(args, namespace)
        parser = getattr(parsed, "parser", self)
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        words = [word.partition("=")[0] for word in takewhile(lambda word: word != "--", args)]
        for action in parser._actions:  # the last one would win, without a word
            twice = sum(map(words.count, action.option_strings)) > 1
            if twice and not isinstance(action, argparse._AppendAction):
                parser.error(f"argument {'/'.join(action.option_strings)} twice")
        return parsed


def build_parser() -> Parser:
    """The whole command line."""
    from cellop_nb import __version__, commands

    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="python3 -m cellop_nb",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=raw,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"cellop_nb {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in commands.MODULES:
        import_module(f"cellop_nb.commands.{module}").add_commands(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 (something failed) or 2 (the input was refused)."""
    if sys.version_info < (3, 11):  # noqa: UP036 - older ones still reach this line
        version = sys.version.split()[0]
        sys.stderr.write(f"Expected Python >= 3.11. Found {version}. To fix it: use a newer python3.\n")
        return 2
    from cellop_nb.commands.terminal import Stopped, complain, flush, settle, stoppable
    from cellop_nb.errors import CellopError, SetupError, StorageError, three_beats

    settle()
    argv = sys.argv[1:] if argv is None else argv
    try:
        with stoppable():
            return _dispatch(build_parser().parse_args(argv), argv)
    except CellopError as error:
        complain(str(error))
        return 1 if isinstance(error, (SetupError, StorageError)) else 2
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        problem = f"one that is too long: {error.filename}"
        complain(three_beats("names that the disk takes", problem, "shorten it"))
        return 2
    except Stopped as stop:
        complain(f"\nStopped by {stop.signal}.")
        return stop.code
    finally:
        flush()


def _dispatch(args: argparse.Namespace, argv: list[str]) -> int:
    from cellop_nb.commands import environment

    args.check(args)
    if args.extras is not None:
        environment.ensure(args.extras, argv)
    return args.main(args)


if __name__ == "__main__":
    sys.exit(main())
