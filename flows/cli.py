"""The command line: a thin face over the flows. Heavy imports happen inside the command that needs them."""

import argparse
import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any, NoReturn

from tasks.core.errors import ForgetlessError

GATE_CODES = {"promote": 0, "reject": 4, "inconclusive": 5}
INTERRUPTED = "Interrupted. What finished is kept: the same command goes on from there."


class _Terminated(BaseException):
    """SIGTERM came: everything at work cleans up behind itself, as after Ctrl-C."""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 wrong usage or configuration, 3 data rejected, 130
    interrupted, 143 terminated; with --gate also 4 over budget, 5 inconclusive. A user's mistake gives one sentence, no
    traceback."""
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["lm-eval"]:  # the rest is lm-eval's to read
        rest = given[1:]
        arguments = argparse.Namespace(command=lambda _: _lm_eval(rest), debug=False, interrupted="Interrupted.")
    else:
        arguments = _parser().parse_args(given)
    from tasks.core.settings import quiet_libraries

    quiet_libraries()
    os.umask(os.umask(0) | stat.S_IWOTH)  # a group may share what is written, not everyone change it
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        with _raising_on_sigterm():
            return command(arguments)
    except ForgetlessError as error:
        if arguments.debug:
            raise
        return _fail(arguments, str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail(arguments, arguments.interrupted, 128 + signal.SIGINT)
    except _Terminated:
        return _fail(arguments, arguments.interrupted.replace("Interrupted", "Terminated"), 128 + signal.SIGTERM)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if arguments.debug:
            raise
        text = f"Failed: {type(error).__name__}: {error}\nRun again with --debug for the traceback."
        return _fail(arguments, text, 1)


@contextlib.contextmanager
def _raising_on_sigterm() -> Iterator[None]:
    """Raise _Terminated within when SIGTERM comes. In a flow the signal is Prefect's first, which ends the flow as
    crashed and then sends the signal again to whoever handled it before."""

    def end(*_: object) -> NoReturn:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    former = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _fail(arguments: argparse.Namespace, text: str, code: int) -> int:
    from tasks.core.addresses import without_secrets

    text = without_secrets(text)
    if getattr(arguments, "json", False):
        _print_json({"error": text, "exit_code": code}, indent=None)
    for line in text.split("\n"):
        _say(f"forgetless: {line}", sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        from flows.screen import visible
        from tasks.core.addresses import without_secrets

        self.exit(2, f"forgetless: {visible(without_secrets(message))}. See: {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    debug = _Parser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common = _Parser(add_help=False, parents=[debug])
    common.add_argument("--store", metavar="URL", help="folder or s3://bucket/prefix (default: .forgetless)")
    output = _Parser(add_help=False)
    output.add_argument("--json", action="store_true", help="print the result as JSON")
    recipe = _Parser(add_help=False)
    recipe.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name (quickstart) or a YAML file")
    recipe.add_argument("--set", metavar="a.b=c", action="append", default=[], dest="overrides", help="override a key")
    recipe.add_argument("--data", metavar="URI", help="file or Hub data set in place of the recipe's sources")

    parser = _Parser(
        prog="forgetless",
        description="Fine-tune an open LLM and prove what it gained and what it forgot.",
    )
    parser.add_argument("--version", action="version", version=metadata.version("forgetless"))
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    def add(name: str, work: Callable[[argparse.Namespace], int], text: str, *parents: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, parents=[*parents, common])
        command.set_defaults(command=work, interrupted=INTERRUPTED)
        return command

    run = add("run", _run, "Run a recipe: from data to a chat model with a verdict.", recipe, output)
    run.add_argument("--gate", action="store_true", help="stop before the merge unless promoted; exit 4 or 5")
    add("plan", _plan, "Say what a run would do, and find every configuration error.", recipe, output)
    text = "Bring all that a recipe needs from elsewhere into the store, for runs without a network."
    add("fetch", _fetch, text, recipe, output)
    add("runs", _runs, "List the runs in the store.", output)
    show = add("show", _show, "Show one run.", output)
    text = "a run's name, or latest; with --lineage also the name of its model in Ollama, or a file's or model's sha256"
    show.add_argument("run", metavar="RUN", help=text)
    show.add_argument("--lineage", action="store_true", help="say what its model is made from, back to the rows")
    text = "Make a run again from nothing, in a store of its own, and compare bytes and scores."
    reproduce = add("reproduce", _reproduce, text, output)
    reproduce.add_argument("run", metavar="RUN", help="a completed run's name, or latest")
    text = "where the second run's store is kept (default: a temporary folder)"
    reproduce.add_argument("--into", metavar="URL", help=text)
    compare = add("compare", _compare, "Say what differs between finished runs, item by item.", output)
    compare.add_argument("first", metavar="RUN", help="the run that the others are compared with, or latest")
    compare.add_argument("others", metavar="RUN", nargs="+", help="runs scored on the same items")
    text = "Make one adapter of several runs' adapters, and judge it as a run of its own."
    _add_combine_options(add("combine", _combine, text, output))
    evaluate = add("eval", _eval, "Score any model on a suite, without training.", output)
    evaluate.add_argument("model", metavar="MODEL", help="a run's name, or a base: folder, GGUF file or Hub id")
    suite = "a shipped suite's name, or a YAML file (several: --suite A --suite B)"
    evaluate.add_argument("--suite", metavar="SUITE", action="append", required=True, dest="suites", help=suite)
    evaluate.add_argument("--rows", metavar="FOLDER", help="the rows of lm-eval's tasks, in place of the Hub")
    evaluate.add_argument("--limit", metavar="N", type=_count, help="score at most this many items of each task")
    evaluate.add_argument("--adapter", metavar="RUN", help="a run's name, or a folder with an adapter of MODEL's")
    text = "how a folder's adapter was trained (default: lora)"
    evaluate.add_argument("--method", choices=["lora", "qlora", "int8", "full"], default="lora", help=text)
    text = "override a key, such as eval.seed=1"
    evaluate.add_argument("--set", metavar="a.b=c", action="append", default=[], dest="overrides", help=text)
    text = "lm-eval's own command line, which also knows --model forgetless."
    commands.add_parser("lm-eval", help=text, add_help=False)
    text = "Say what moved in a run, item by item, and what to try next."
    add("explain", _explain, text, output).add_argument("run", metavar="RUN", help="a run's name, or latest")
    text = "Scale a run's adapter without training again: gain and forgetting at each strength."
    strength = add("strength", _curve, text, output)
    strength.set_defaults(by="strength")
    strength.add_argument("run", metavar="RUN", help="a run's name, or latest")
    text = "strengths, 1 is the adapter as trained (default: 0.25,0.5,0.75,1)"
    strength.add_argument("--at", metavar="A,B", type=_strengths, default=None, help=text)
    steps = add("steps", _curve, "Judge the steps of a run's training that were kept (train.snapshots).", output)
    steps.set_defaults(by="step")
    steps.add_argument("run", metavar="RUN", help="a run's name, or latest")
    text = "Try settings of a recipe, and find the front of gain against forgetting."
    _add_sweep_options(add("sweep", _sweep, text, recipe, output))
    chat = add("chat", _chat, "Chat in the terminal with what a run made, or with any model.", output)
    text = "a run's name, latest, a GGUF file, a model's folder, or ollama:NAME"
    chat.add_argument("model", metavar="MODEL", help=text)
    text = "which of the things a run made (default: its GGUF file; its adapter, where that cannot be merged)"
    kinds = ["auto", "adapter", "merged", "gguf", "ollama"]
    chat.add_argument("--as", dest="kind", choices=kinds, default="auto", help=text)
    text = "which of a run's GGUF files, such as q4_k_m (default: export.serve)"
    chat.add_argument("--file", metavar="QUANTISATION", help=text)
    text = "let the run's base answer too, with the same seed; needs the memory of both"
    chat.add_argument("--base", action="store_true", help=text)
    chat.add_argument("--system", metavar="TEXT", help="system prompt (default: the run's, or the model's own)")
    chat.add_argument("--prompt", metavar="TEXT", help="ask this once and exit")
    text = "0 always takes the likeliest token (default), 1 draws as the model has it"
    chat.add_argument("--temperature", metavar="F", type=_between(float, 0, 10), default=0.0, help=text)
    text = "draw among the likeliest tokens with this share of the probability (default: 1, all)"
    chat.add_argument("--top-p", metavar="F", type=_between(float, 0, 1), default=1.0, help=text)
    text = "the same seed draws the same answers (default: 0)"
    chat.add_argument("--seed", metavar="N", type=_between(int, 0, 2**31 - 1), default=0, help=text)
    text = "longest answer (default: 512)"
    chat.add_argument("--max-tokens", metavar="N", type=_count, default=512, help=text)
    chat.set_defaults(interrupted="Interrupted.")
    export = add("export", _export, "Export a finished run's model.", output)
    export.add_argument("run", metavar="RUN", help="a run's name, or latest")
    export.add_argument(
        "--to", required=True, choices=["ollama", "dir", "hub"], help="register in Ollama, copy to a folder, or push"
    )
    export.add_argument("--out", metavar="DIR", help="folder for --to dir")
    text = "push the registered model to ollama.com too, as NAMESPACE[/NAME[:TAG]]"
    export.add_argument("--push", metavar="NAMESPACE", help=text)
    export.add_argument("--repo", metavar="NAMESPACE/NAME", help="repository for --to hub")
    text = "what to push (default: the adapter; of method full the merged model)"
    export.add_argument("--as", choices=["adapter", "merged", "gguf"], dest="kind", help=text)
    export.add_argument("--private", action="store_true", help="the new repository is private")
    export.add_argument("--dry-run", metavar="DIR", help="write what --to hub would push to a new folder instead")
    text = "Let an alias name a run's version, in the registry and in Ollama, if its verdict allows."
    promote = add("promote", _promote, text, output)
    promote.add_argument("run", metavar="RUN", help="a run's name, or latest")
    text = "the alias (default: export.ollama_alias of its recipe, else promoted)"
    promote.add_argument("--alias", metavar="NAME", help=text)
    text = "promote it whatever its verdict; who does it and why are recorded"
    promote.add_argument("--force", metavar="WHY", help=text)
    text = "Let an alias name the version before, in the registry and in Ollama."
    rollback = add("rollback", _rollback, text, output)
    rollback.add_argument("name", metavar="NAME", help="a model of the registry")
    rollback.add_argument("--alias", metavar="NAME", default="promoted", help="the alias (default: promoted)")
    text = "List the models of the registry, or one's versions and the history of its aliases."
    registry = add("registry", _registry, text, output)
    registry.add_argument("name", metavar="NAME", nargs="?", help="a model of the registry (default: all)")
    dashboard = add("dashboard", _dashboard, "Open the dashboard on the store.")
    dashboard.add_argument("--port", type=int, default=8501)
    add("doctor", _doctor, "Check this machine, and say what each missing piece costs.", output)
    text = "Check, show or convert training data, without a run."
    data = commands.add_parser("data", help=text, description=text)
    _add_data_commands(data.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser), output, debug)
    text = "See, check and clean the store."
    store = commands.add_parser("store", help=text, description=text)
    _add_store_commands(store.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser), output, common)
    return parser


def _add_combine_options(combine: argparse.ArgumentParser) -> None:
    combine.add_argument("runs", metavar="RUN", nargs="+", help="two runs or more, trained on one base")
    text = "how much of each (default: 1 of each); below 0 takes away what a run learned: --weights=1,-0.5"
    combine.add_argument("--weights", metavar="A,B", type=_numbers, default=[], help=text)
    pruning = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
    names = ["cat", "linear", "svd", *pruning, *(f"{name}_svd" for name in pruning)]
    how = combine.add_mutually_exclusive_group()
    text = f"PEFT's: {', '.join(names)} (default: cat, the exact sum)"
    how.add_argument("--method", metavar="NAME", choices=names, default="cat", help=text)
    text = "merge them into the base one after the other, whatever their method"
    how.add_argument("--sequence", action="store_const", dest="method", const="sequence", help=text)
    text = "share of entries that ties, dare and magnitude_prune keep (default: 0.5)"
    combine.add_argument("--density", metavar="D", type=float, help=text)
    combine.add_argument("--rank", metavar="N", type=int, help="of what an svd method makes (default: the largest)")
    combine.add_argument("--seed", metavar="N", type=int, default=42, help="of what dare leaves out (default: 42)")
    text = "score on this suite in place of what the runs were scored on (several: --suite A --suite B)"
    combine.add_argument("--suite", metavar="SUITE", action="append", default=[], dest="suites", help=text)
    combine.add_argument("--name", metavar="NAME", help="names the run and the exported model")
    combine.add_argument("--gate", action="store_true", help="stop before the merge unless promoted; exit 4 or 5")


def _add_sweep_options(sweep: argparse.ArgumentParser) -> None:
    text = "try each of these values with all others: train.rank=4,8,16"
    sweep.add_argument("--grid", metavar="a.b=c,d", action="append", default=[], help=text)
    text = "draw from a range, whose logarithm is uniform with :log: train.learning_rate=1e-4:1e-2:log"
    sweep.add_argument("--random", metavar="a.b=c:d", action="append", default=[], help=text)
    text = "let Optuna choose among all these (TPE, for more gain and less forgetting)"
    sweep.add_argument("--optuna", action="store_true", help=text)
    text = "how many settings --random and --optuna try"
    sweep.add_argument("--trials", metavar="N", type=int, help=text)
    text = "trainings of each setting (default: 1; intervals then speak of seeds too)"
    sweep.add_argument("--seeds", metavar="N", type=int, default=1, help=text)
    sweep.add_argument("--seed", metavar="N", type=int, default=0, help="of what is drawn (default: 0)")
    text = "stop trainings whose validation loss is clearly above the median of the others'"
    sweep.add_argument("--prune", action="store_true", help=text)
    text = "also scale the best adapter so, as points of the front"
    sweep.add_argument("--strengths", metavar="A,B", type=_strengths, default=[], help=text)
    text = "trials at once; each needs the memory of a run (default: 1)"
    sweep.add_argument("--concurrency", metavar="N", type=_between(int, 1, 64), default=1, help=text)


def _add_data_commands(commands: Any, *parents: argparse.ArgumentParser) -> None:
    reading = _Parser(add_help=False)
    reading.add_argument("--format", metavar="NAME", help="the rows' format, where it is not to be detected")
    reading.add_argument("--entry", metavar="NAME", help="entry of the dataset_info.json that URI names")
    reading.add_argument("--split", metavar="NAME", help="split of a Hub data set, or of a file that holds several")
    reading.add_argument("--max-rows", metavar="N", type=int, help="read at most this many rows")
    text = "override a key, such as data.clean.simplified=true"
    reading.add_argument("--set", metavar="a.b=c", action="append", default=[], dest="overrides", help=text)
    seen = _Parser(add_help=False)
    seen.add_argument("--recipe", metavar="RECIPE", help="take its data (in place of URI), cleaning, items and base")
    seen.add_argument("--model", metavar="BASE", help="base whose tokenizer sees the rows: folder, GGUF file or Hub id")

    def add(name: str, work: Callable[[argparse.Namespace], int], text: str, *more: Any) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(
            name, help=text, description=text, parents=[reading, *more, *parents]
        )
        needed = {} if seen not in more else {"nargs": "?"}
        uri = "file, folder, glob, s3:// or https:// address, Hub data set, or dataset_info.json with --entry"
        command.add_argument("uri", metavar="URI", help=uri, **needed)  # type: ignore[arg-type]
        command.set_defaults(command=work, interrupted="Interrupted.", recipe=None, model=None)
        return command

    check = add("check", _data_check, "Say what a run would find in its data: exit 0 if it passes, 3 if not.", seen)
    check.add_argument("--out", metavar="FOLDER", help="keep the rows, the quarantine and the reports in a new folder")
    show = add("show", _data_show, "Show rows as they are learned, or those that are quarantined.", seen)
    show.add_argument("--rows", metavar="N", type=_count, default=10, help="how many (default: 10)")
    show.add_argument("--quarantined", action="store_true", help="show quarantined rows, with their reasons")
    show.add_argument("--html", metavar="FILE", help="write the rows as the model sees them as a page")
    convert = add("convert", _data_convert, "Write rows of any format as JSON Lines of one.")
    convert.add_argument("--to", required=True, choices=["messages", "alpaca", "sharegpt"], help="their format")
    convert.add_argument("--out", metavar="FILE", help="write to this file, not to the standard output")
    convert.add_argument("--clean", action="store_true", help="clean the rows too, by data.clean")


def _add_store_commands(commands: Any, *parents: argparse.ArgumentParser) -> None:
    def add(name: str, work: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, parents=parents)
        command.set_defaults(command=work, interrupted="Interrupted. The same command does the rest.")
        return command

    ls = add("ls", _store_ls, "List artifacts, and the runs that reach them.")
    ls.add_argument("name", metavar="KIND|RUN", nargs="?", help="of this kind, or of this run (default: all)")
    add("du", _store_du, "Say what takes how much room, and what of it runs reach.")
    verify = add("verify", _store_verify, "Hash every file again: exit 1 if one is damaged, missing or additional.")
    verify.add_argument("run", metavar="RUN", nargs="?", help="of this run alone (default: all)")
    gc = add("gc", _store_gc, "Remove what no run reaches and what killed processes left, if older than a day.")
    gc.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")
    gc.add_argument("--cache", action="store_true", help="empty this machine's cache too, but for what is in use")
    rm = add("rm", _store_rm, "Delete a run or what was fetched, whose artifacts gc then removes, or one artifact.")
    text = "a run's name, or what was fetched or an artifact as store ls names it"
    rm.add_argument("name", metavar="RUN|fetched/NAME|KIND/KEY", help=text)


def _strengths(text: str) -> list[float]:
    found = [float(part) for part in text.split(",")]
    if not all(0 < share <= 2 for share in found):
        raise argparse.ArgumentTypeError("expected numbers above 0 and up to 2")
    return found


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError("expected numbers, such as 0.7,0.3") from None


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("expected 1 or more")
    return number


def _between(kind: Callable[[str], float], low: float, high: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected a number from {low:g} to {high:.10g}")
        return value

    return number


def _say(text: str, file: Any = None) -> None:
    from flows.screen import visible

    print(visible(text), file=file)


def _print_json(value: Any, indent: int | None = 1) -> None:
    """Print JSON in which no character steers a terminal; read again, it says the same."""
    from flows.screen import CONTROLS

    text = json.dumps(value, ensure_ascii=False, indent=indent)
    print(text.translate({code: f"\\u{code:04x}" for code in CONTROLS}))


def _open_store(arguments: argparse.Namespace) -> Any:
    from tasks.core.settings import read_settings
    from tasks.core.store import open_store

    return open_store(read_settings(arguments.store))


def _run(arguments: argparse.Namespace) -> int:
    from flows.plan import plan_run
    from flows.screen import RunScreen
    from tasks.core.addresses import hide, hide_in_override
    from tasks.core.config import load_recipe
    from tasks.core.manifest import new_run_id
    from tasks.core.settings import read_settings
    from tasks.core.store import check_writable, open_store

    # Everything that can be wrong with the request is said before Prefect or torch is loaded.
    recipe = load_recipe(arguments.recipe, arguments.overrides, arguments.data)
    settings = read_settings(arguments.store)
    store = open_store(settings)
    check_writable(store)
    for note in plan_run(recipe, store)["notes"]:
        _say(f"forgetless: {note}", sys.stderr)
    run_id = new_run_id(recipe.name)
    with RunScreen(run_id, enabled=not arguments.json):
        from flows.finetune import finetune

        manifest = finetune(
            recipe=arguments.recipe,
            overrides=[hide_in_override(override) for override in arguments.overrides],  # Prefect keeps parameters
            data=arguments.data and hide(arguments.data),
            store=settings.store_url,
            gate=arguments.gate,
            run_id=run_id,
        )
    return _show_result(arguments, manifest, store)


def _show_result(arguments: argparse.Namespace, manifest: Any, store: Any) -> int:
    from flows.screen import show_summary

    if arguments.json:
        _print_json(json.loads(manifest.model_dump_json()), indent=None)
    else:
        show_summary(manifest, store)
    return GATE_CODES[manifest.judged.verdict] if arguments.gate and manifest.judged else 0


def _combine(arguments: argparse.Namespace) -> int:
    from flows.screen import RunScreen
    from tasks.core.combination import read_combination
    from tasks.core.config import load_combination
    from tasks.core.manifest import new_run_id
    from tasks.core.settings import read_settings
    from tasks.core.store import check_writable, open_store

    given = {name: getattr(arguments, name) for name in ("runs", "weights", "method", "density", "rank", "seed")}
    config = load_combination(given)
    settings = read_settings(arguments.store)
    store = open_store(settings)
    found = read_combination(store, config, arguments.suites, arguments.name)
    check_writable(store)
    run_id = new_run_id(found.recipe.name)
    with RunScreen(run_id, enabled=not arguments.json):
        from flows.combine import combine

        suites, name, url = arguments.suites, arguments.name, settings.store_url
        manifest = combine(found.config, suites, name=name, store=url, gate=arguments.gate, run_id=run_id)
    return _show_result(arguments, manifest, store)


def _plan(arguments: argparse.Namespace) -> int:
    from flows.plan import plan_run
    from flows.screen import show_plan
    from tasks.core.config import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides, arguments.data)
    plan = plan_run(recipe, _open_store(arguments), offline_ok=True)
    if arguments.json:
        _print_json(plan)
    else:
        show_plan(plan)
    return 0


def _fetch(arguments: argparse.Namespace) -> int:
    from flows.fetch import fetch_recipe
    from flows.screen import show_fetched, show_progress
    from tasks.core.config import load_recipe
    from tasks.core.store import check_writable

    recipe = load_recipe(arguments.recipe, arguments.overrides, arguments.data)
    store = _open_store(arguments)
    check_writable(store)
    with show_progress() as say:
        done = fetch_recipe(recipe, store, say)
    if arguments.json:
        _print_json(done)
    else:
        show_fetched(done)
    return 0


def _runs(arguments: argparse.Namespace) -> int:
    from flows.screen import show_runs
    from tasks.core.manifest import read_manifest, run_ids

    store = _open_store(arguments)
    manifests = []
    for run_id in run_ids(store):
        try:
            manifests.append(read_manifest(store, run_id))
        except ForgetlessError as error:  # one unreadable run must not hide the others
            _say(f"forgetless: {error}", sys.stderr)
    if arguments.json:
        _print_json([m.model_dump(mode="json") for m in manifests])
    else:
        show_runs(manifests, store)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from flows.screen import show_summary
    from tasks.core.manifest import read_manifest

    store = _open_store(arguments)
    if arguments.lineage:
        return _show_lineage(arguments, store)
    manifest = read_manifest(store, arguments.run)
    if arguments.json:
        _print_json(json.loads(manifest.model_dump_json()), indent=None)
    else:
        show_summary(manifest, store)
    return 0


def _show_lineage(arguments: argparse.Namespace, store: Any) -> int:
    from flows.lineage import find_run, origin_lines, trace

    found = trace(store, find_run(store, arguments.run))
    if arguments.json:
        _print_json(found)
    else:
        for depth, name, fact in origin_lines(found):
            _say(f"{'  ' * depth}{name:<{16 - 2 * depth}} {fact}")
    return 0


def _reproduce(arguments: argparse.Namespace) -> int:
    import tempfile
    from pathlib import Path

    from flows.lineage import check_reproducible, compare_runs
    from flows.screen import RunScreen, show_reproduction
    from tasks.core.manifest import new_run_id, read_manifest, run_ids
    from tasks.core.settings import read_settings
    from tasks.core.store import check_writable, open_store

    manifest = read_manifest(_open_store(arguments), arguments.run)
    check_reproducible(manifest)
    with tempfile.TemporaryDirectory(prefix="forgetless-") as scratch:
        settings = read_settings(arguments.into or f"{scratch}/store")
        store = open_store(settings)
        check_writable(store)
        if run_ids(store):
            raise ForgetlessError(f"{store.url} holds runs already: name an empty place with --into.")
        recipe = Path(scratch) / f"{manifest.recipe.name}.yaml"
        recipe.write_text(manifest.recipe.model_dump_json(exclude={"placement"}), encoding="utf-8")  # JSON is YAML
        run_id = new_run_id(manifest.recipe.name)
        with RunScreen(run_id, enabled=not arguments.json):
            from flows.finetune import finetune

            again = finetune(
                recipe=str(recipe), overrides=["export.ollama=false"], store=settings.store_url, run_id=run_id
            )
    found = compare_runs(manifest, again)
    if arguments.json:
        _print_json(found)
    else:
        show_reproduction(found)
    return 0 if found["same"] else 1


def _compare(arguments: argparse.Namespace) -> int:
    from flows.screen import show_comparison
    from tasks.core.manifest import read_manifest
    from tasks.evaluation.forgetting import compare_runs

    store = _open_store(arguments)
    first = read_manifest(store, arguments.first)
    found = [compare_runs(store, first, read_manifest(store, other)) for other in arguments.others]
    if arguments.json:
        _print_json([c.model_dump(mode="json") for c in found])
    else:
        show_comparison(found)
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from flows.screen import RunScreen, show_scores
    from tasks.core.config import load_suites, local_model
    from tasks.core.errors import ConfigError
    from tasks.core.manifest import read_manifest, run_ids
    from tasks.core.settings import read_settings
    from tasks.core.store import check_writable, open_store

    overrides = [*arguments.overrides, *([f"eval.limit={arguments.limit}"] if arguments.limit else [])]
    overrides += [f"eval.rows={arguments.rows}"] if arguments.rows else []
    evaluation = load_suites(arguments.suites, overrides)
    settings = read_settings(arguments.store)
    store = open_store(settings)
    check_writable(store)
    model, adapter = arguments.model, arguments.adapter
    if model == "latest" or model in run_ids(store):
        if adapter:
            raise ConfigError(f"{model} is a run, which has an adapter of its own: leave out --adapter.")
        run = read_manifest(store, model)
        config, adapter = run.recipe.model, run.run_id
    else:
        config = local_model(model)
    if adapter and "/" in adapter:
        adapter = os.path.abspath(adapter)
    with RunScreen("", enabled=not arguments.json):
        from flows.evaluate import evaluate

        sheet = evaluate(config, evaluation, adapter, arguments.method, settings.store_url)
    if arguments.json:
        _print_json(json.loads(sheet.model_dump_json()), indent=None)
    else:
        show_scores(evaluation, sheet)
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    from flows.screen import show_explanation
    from tasks.core.manifest import read_manifest
    from tasks.evaluation.explain import explain_run

    store = _open_store(arguments)
    found = explain_run(store, read_manifest(store, arguments.run))
    if arguments.json:
        _print_json(json.loads(found.model_dump_json()), indent=None)
    else:
        show_explanation(found)
    return 0


def _lm_eval(given: list[str]) -> int:
    from lm_eval.__main__ import cli_evaluate

    import tasks.evaluation.lm_eval_model  # noqa: F401  # registers it

    sys.argv = ["forgetless lm-eval", *given]
    cli_evaluate()
    return 0


def _curve(arguments: argparse.Namespace) -> int:
    from flows.screen import RunScreen, show_curve
    from tasks.core.settings import read_settings

    url = read_settings(arguments.store).store_url
    with RunScreen("", enabled=not arguments.json):
        from flows import shipping

        if arguments.by == "step":
            curve = shipping.judge_steps(arguments.run, url)
        else:
            curve = shipping.scale_adapter(arguments.run, arguments.at or shipping.STRENGTHS, url)
    if arguments.json:
        _print_json(json.loads(curve.model_dump_json()), indent=None)
    else:
        show_curve(curve, arguments.by)
    return 0


def _sweep(arguments: argparse.Namespace) -> int:
    from flows.plan import plan_run
    from flows.screen import show_sweep, show_trials
    from tasks.core.addresses import hide, hide_in_override
    from tasks.core.config import load_search
    from tasks.core.search import plan_search
    from tasks.core.settings import read_settings
    from tasks.core.store import check_writable, open_store

    names = ("grid", "random", "optuna", "trials", "seeds", "seed", "prune", "strengths")
    search = load_search({name: getattr(arguments, name) for name in names})
    asked = {name: getattr(arguments, name) for name in ("recipe", "overrides", "data")}
    found = plan_search(**asked, search=search)
    asked["overrides"] = [hide_in_override(override) for override in arguments.overrides]  # Prefect keeps parameters
    asked["data"] = arguments.data and hide(arguments.data)
    settings = read_settings(arguments.store)
    store = open_store(settings)
    check_writable(store)
    for note in plan_run(found.recipe, store)["notes"]:
        _say(f"forgetless: {note}", sys.stderr)
    with show_trials(enabled=not arguments.json):
        from flows.sweep import sweep

        done = sweep(search, **asked, store=settings.store_url, concurrency=arguments.concurrency)
    if arguments.json:
        _print_json(json.loads(done.model_dump_json()), indent=None)
    else:
        show_sweep(done)
    return 0


def _exported(arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    from flows.registry import require_exported
    from tasks.core.manifest import read_manifest

    store = _open_store(arguments)
    manifest = read_manifest(store, arguments.run)
    require_exported(manifest)
    return store, manifest, manifest.gguf


def _chat(arguments: argparse.Namespace) -> int:
    from flows.chat import Screen, ask_once, chat, open_speakers
    from tasks.core.errors import ConfigError
    from tasks.export.chat import Sampling

    text = arguments.prompt
    if text is None and arguments.json:
        raise ConfigError("--json prints the answer to one question: give it with --prompt TEXT.")
    if text is not None and not text.strip():
        raise ConfigError("--prompt is empty: give it a question, or leave it out to chat.")
    sampling = Sampling(arguments.temperature, arguments.top_p, arguments.seed, arguments.max_tokens)
    store = _open_store(arguments)
    speakers = open_speakers(store, arguments.model, arguments.kind, arguments.file, arguments.base, arguments.system)
    if arguments.json:
        _print_json(ask_once(speakers, text, sampling))
    elif text is not None:
        Screen(speakers, sampling, once=True).answer(text)
    else:
        chat(speakers, sampling)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    import shutil
    from pathlib import Path

    from tasks.core.errors import ConfigError, ExportError

    if arguments.to == "hub":
        return _push(arguments)
    store, manifest, gguf = _exported(arguments)
    if arguments.push and arguments.to != "ollama":
        raise ConfigError("--push goes with --to ollama.")
    if arguments.to == "dir":
        if not arguments.out:
            raise ConfigError("--to dir needs --out DIR: the folder to copy the GGUF files and the Modelfile to.")
        target = Path(arguments.out)
        shutil.copytree(
            store.local_folder(gguf.artifact), target, ignore=shutil.ignore_patterns("_*"), dirs_exist_ok=True
        )
        result = {"folder": str(target), "files": gguf.files | gguf.extras}
        text = f"Copied {', '.join([*gguf.files.values(), *gguf.extras.values()])} and {gguf.modelfile} to {target}."
    else:
        from flows.screen import show_progress
        from tasks.export import register as registrar

        config, name = manifest.recipe.export, manifest.recipe.name
        pushed = registrar.name_to_push(config, gguf, name, arguments.push) if arguments.push else None
        with show_progress():
            registrar.require_proven(config, gguf, manifest.proof, store)
            expected = manifest.proof.answer if manifest.proof else None
            done = registrar.register(config, gguf, manifest.merged, manifest.base, name, store, expected)
            if not done.registered:
                raise ExportError(
                    f"No Ollama answers at {done.url}. Start it (ollama serve), or set OLLAMA_HOST, then run this "
                    f"again. By hand: {done.note}"
                )
            moved = registrar.follow_all(store, manifest.recipe.registry_name, manifest.run_id)
            if pushed:
                registrar.push(done, pushed)
        result = {**done.model_dump(exclude={"alias"}), "aliases": moved, "pushed": pushed}
        text = f"Registered {done.name} at {done.url}. Chat with it: ollama run {done.name}"
        more = (*(f"{alias} is now this version." for alias in moved), done.note, pushed and f"Pushed as {pushed}.")
        text += "".join(f"\n{line}" for line in more if line)
    if arguments.json:
        _print_json(result)
    else:
        _say(text)
    return 0


def _promote(arguments: argparse.Namespace) -> int:
    from flows.registry import promote_run

    store = _open_store(arguments)
    return _show_move(arguments, promote_run(store, arguments.run, arguments.alias, arguments.force))


def _rollback(arguments: argparse.Namespace) -> int:
    from flows.registry import roll_back

    return _show_move(arguments, roll_back(_open_store(arguments), arguments.name, arguments.alias))


def _show_move(arguments: argparse.Namespace, done: dict[str, Any]) -> int:
    if arguments.json:
        _print_json(done)
        return 0
    replaced = "" if done["replaced"] is None else f", before version {done['replaced']}"
    _say(f"{done['name']}:{done['alias']} is version {done['version']} (run {done['run']}){replaced}.")
    for line in (done["ollama"] and f"In Ollama too: ollama run {done['ollama']}", done["note"]):
        if line:
            _say(line)
    return 0


def _registry(arguments: argparse.Namespace) -> int:
    from flows import registry
    from flows.screen import show_model, show_models

    store = _open_store(arguments)
    found: Any = registry.describe_model(store, arguments.name) if arguments.name else registry.list_models(store)
    if arguments.json:
        _print_json(found)
    elif arguments.name:
        show_model(found)
    else:
        show_models(found)
    return 0


def _push(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from flows.publish import push_run
    from tasks.core.errors import ConfigError
    from tasks.core.manifest import read_manifest

    if not arguments.repo:
        raise ConfigError("--to hub needs --repo NAMESPACE/NAME: the repository that the model goes to.")
    store = _open_store(arguments)
    run = read_manifest(store, arguments.run)
    dry_run = Path(arguments.dry_run) if arguments.dry_run else None
    done = push_run(store, run, arguments.repo, arguments.kind, arguments.private, dry_run)
    if arguments.json:
        _print_json(done)
    else:
        where = f"Wrote {done['folder']}" if dry_run else f"Pushed to {done['url']}"
        _say(f"{where}: {', '.join(done['files'])}.")
    return 0


def _dashboard(arguments: argparse.Namespace) -> int:
    import importlib.util
    from pathlib import Path

    from tasks.core.errors import ConfigError
    from tasks.core.settings import STORE_VARIABLE, read_settings

    if importlib.util.find_spec("streamlit") is None:
        raise ConfigError("The dashboard needs streamlit, which is not installed: pip install 'forgetless[dashboard]'")
    app = Path(__file__).resolve().parents[1] / "dashboards" / "app.py"
    environment = {**os.environ, STORE_VARIABLE: read_settings(arguments.store).store_url}
    options = ["--server.port", str(arguments.port), "--server.address", "127.0.0.1", "--server.headless", "true"]
    print(f"Dashboard: http://127.0.0.1:{arguments.port} (stop it with Ctrl-C)", flush=True)
    command = [sys.executable, "-m", "streamlit", "run", str(app), *options]
    return subprocess.run(command, env=environment, check=False).returncode


def _doctor(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from flows.doctor import check_machine
    from flows.screen import show_findings
    from tasks.core.settings import read_settings

    findings = check_machine(read_settings(arguments.store))
    if arguments.json:
        _print_json([asdict(f) for f in findings])
    else:
        show_findings(findings)
    return 1 if any(f.state == "missing" and f.required for f in findings) else 0


def _store_ls(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from flows.screen import show_artifacts
    from flows.store import list_artifacts

    found = list_artifacts(_open_store(arguments), arguments.name)
    if arguments.json:
        _print_json([asdict(artifact) for artifact in found])
    else:
        show_artifacts(found)
    return 0


def _store_du(arguments: argparse.Namespace) -> int:
    from flows.screen import show_usage
    from flows.store import measure_store
    from tasks.core.settings import read_settings

    usage = measure_store(_open_store(arguments), read_settings(arguments.store))
    if arguments.json:
        _print_json(usage)
    else:
        show_usage(usage)
    return 0


def _store_verify(arguments: argparse.Namespace) -> int:
    from flows.screen import show_problems, show_progress
    from flows.store import verify_artifacts

    store = _open_store(arguments)
    with show_progress() as say:
        found = verify_artifacts(store, arguments.run, say)
    if arguments.json:
        _print_json(found)
    else:
        show_problems(found)
    return 1 if found["problems"] else 0


def _store_gc(arguments: argparse.Namespace) -> int:
    from flows.screen import show_progress, show_removed
    from flows.store import collect_garbage
    from tasks.core.settings import read_settings

    store, settings = _open_store(arguments), read_settings(arguments.store)
    with show_progress() as say:
        done = collect_garbage(store, settings, say, arguments.dry_run, arguments.cache)
    if arguments.json:
        _print_json(done)
    else:
        show_removed(done)
    return 0


def _store_rm(arguments: argparse.Namespace) -> int:
    from flows.store import remove_from_store

    path = remove_from_store(_open_store(arguments), arguments.name)
    if arguments.json:
        _print_json({"removed": path})
    else:
        ends = " Its artifacts: forgetless store gc" if path.startswith(("runs/", "fetched/")) else ""
        _say(f"Removed {path}.{ends}")
    return 0


def _data_request(arguments: argparse.Namespace) -> Any:
    from flows.data import read_request

    options = {name: getattr(arguments, name) for name in ("format", "entry", "split", "max_rows")}
    given = {name: value for name, value in options.items() if value is not None}
    return read_request(arguments.uri, given, arguments.recipe, arguments.model, arguments.overrides)


def _data_check(arguments: argparse.Namespace) -> int:
    import tempfile
    from pathlib import Path

    from flows.data import check_data, new_folder
    from flows.screen import show_check, show_progress

    sections = _data_request(arguments)
    out = Path(arguments.out) if arguments.out else None
    place: Any = new_folder(out, "--out") if out else tempfile.TemporaryDirectory(prefix="forgetless-")
    with place as folder:
        with show_progress() as say:
            check = {**check_data(sections, Path(folder), say), "out": arguments.out}
        if out:
            (out / "check.json").write_text(json.dumps(check, ensure_ascii=False, indent=1), encoding="utf-8")
    if arguments.json:
        _print_json(check)
    else:
        show_check(check)
    return 0 if check["passed"] else 3


def _data_show(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from flows import data, screen
    from tasks.core.errors import ConfigError

    sections = _data_request(arguments)
    if arguments.html and (arguments.quarantined or sections.model is None):
        raise ConfigError("--html shows rows as a model sees them: name the model (--model BASE or --recipe RECIPE).")
    with screen.show_progress() as say:
        if arguments.quarantined:
            rows, show = data.read_quarantined(sections, arguments.rows, say), screen.show_quarantined
        else:
            rows, show = data.read_first(sections.data, arguments.rows), screen.show_conversations
        if sections.model and not arguments.quarantined:
            encoder, max_tokens = data.open_encoder(sections.model, say), sections.train.max_tokens
            if arguments.html:
                from tasks.data.tokens import show_sample

                with data.new_file(Path(arguments.html), "--html") as file:
                    file.write(show_sample(encoder, rows, max_tokens).encode())
            rows, show = data.see_as_model(encoder, rows, max_tokens), screen.show_sequences
    if arguments.json:
        _print_json(rows)
    elif arguments.html:
        print(f"Wrote {len(rows)} rows to {arguments.html}.")
    else:
        show(rows)
    return 0


def _data_convert(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from flows.data import convert_rows, new_file
    from tasks.core.errors import ConfigError

    if arguments.json and not arguments.out:
        raise ConfigError("--json prints the counts where the rows would go: name a file for the rows, --out FILE.")
    sections = _data_request(arguments)
    with contextlib.ExitStack() as opened:
        out = Path(arguments.out) if arguments.out else None
        file = opened.enter_context(new_file(out, "--out")) if out else sys.stdout.buffer
        written, refused = convert_rows(sections.data, arguments.to, arguments.clean, file.write)
        file.flush()
    if arguments.json:
        _print_json({"out": arguments.out, "written": written, "refused": refused})
        return 0
    print(f"forgetless: {written:,} rows written{f' to {arguments.out}' if arguments.out else ''}.", file=sys.stderr)
    for r in refused:
        left = f"{r['rows']:,} left out: {r['reason']}, first {r['first']}: {r['detail']}"
        _say(f"forgetless: {left}", sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
