"""`hwmodel cost` and `hwmodel workload`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

_F = Callable[..., Any]
_MACHINE = (
    click.option(
        "--device", required=True, metavar="NAME|FILE", help="See 'hwmodel devices list'."
    ),
    click.option("--count", type=int, metavar="N", help="N devices. [default: as few as serve]"),
    click.option("--quant", metavar="TYPE|FILE", help="Only this type, or a checkpoint's sizes."),
    click.option("--engine", metavar="NAME", help="Only this engine."),
    click.option("--ram", type=float, metavar="GB", help="Let experts live in host memory."),
    click.option("--model", default="step-3.5-flash", metavar="NAME|FILE", help="Another model."),
)
_TERMS = (
    click.option("--buy", type=float, metavar="USD", help="Price of the whole machine."),
    click.option("--rent", type=float, metavar="USD", help="Price of renting it for an hour."),
    click.option("--watts", type=float, metavar="W", help="What it draws under load."),
    click.option("--kwh", type=float, metavar="USD", help="Price of a kWh."),
    click.option("--years", type=float, metavar="N", help="Years until it is written off."),
    click.option("--days", type=float, metavar="N", help="Days of use in a year."),
    click.option("--hours", type=float, metavar="N", help="Hours of use in a day."),
)


def _options(*groups: tuple[Callable[[_F], _F], ...]) -> Callable[[_F], _F]:
    def apply(command: _F) -> _F:
        for option in reversed([o for group in groups for o in group]):
            command = option(command)
        return command

    return apply


@click.command()
@_options(_MACHINE)
@click.option("--depth", metavar="N",
              help="Tokens of context. [default: 8192, or all that the model has]")  # fmt: skip
@click.option(
    "--concurrency", type=int, default=1, show_default=True, metavar="N",
    help="Sequences decoded together.",
)  # fmt: skip
@_options(_TERMS)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def cost(depth: str | None, as_json: bool, **given: Any) -> None:
    """What a million tokens, a working day and a token's energy cost: bought, rented, electricity.

    \b
    Examples:
      hwmodel cost --device h100 --concurrency 16
      hwmodel cost --device m4max --hours 8 --kwh 0.30
    """
    from hwmodel.cli_support import print_json
    from hwmodel.cost import cost_sheet, terms_of
    from hwmodel.jobs_view import cost_json, cost_text

    terms = {k: given.pop(k) for k in ("buy", "rent", "watts", "kwh", "years", "days", "hours")}
    candidate, tokens, drafts = _machine(depth, given)
    sheet = cost_sheet(candidate, terms_of(candidate, **terms), tokens, drafts)
    if as_json:
        print_json(cost_json(sheet))
    else:
        click.echo(cost_text(sheet))


def _machine(context: str | int | None, given: dict[str, Any]) -> tuple[Any, int, int]:
    """The plan's configuration, the context and the plan's number of drafts."""
    from hwmodel.catalogue import find_model
    from hwmodel.cli_support import note
    from hwmodel.errors import RequestError
    from hwmodel.plan import make_plan
    from hwmodel.request import make_request

    model = find_model(given.pop("model"))
    job = given.pop("job", None)
    if context is None:
        context = min(8192, model.max_context)
    elif job is not None and int(context) > model.max_context:
        raise RequestError(
            f"{job}: its longest context is {int(context):,} tokens; {model.title} holds "
            f"{model.max_context:,}"
        )
    try:
        request = make_request(
            given.pop("device"), model, context=context, ram_gb=given.pop("ram"), **given
        )
    except RequestError as error:  # the plan's option has another name here
        raise RequestError(str(error).replace("--context", "--depth")) from error
    plan = make_plan(request)
    if not plan.holds:
        note(f"{plan.problem}; the closest that holds it is used")
    return plan.chosen, request.context, plan.best_drafts


@click.command()
@click.argument("profile", required=False, metavar="[NAME|FILE.toml]")
@_options(_MACHINE[1:])
@click.option(
    "--device", "devices", multiple=True, metavar="NAME|FILE",
    help="A machine; may be given several times.",
)  # fmt: skip
@_options(_TERMS)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def workload(profile: str | None, devices: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Wall time and cost of a whole job; without a name, the list of jobs.

    \b
    Examples:
      hwmodel workload
      hwmodel workload coding-agent --device m4max --device dgx-spark --device h100

    A job of your own is a TOML file with [[turns]], each with input_tokens and answer_tokens, and
    optionally reasoning_tokens, wait_s (tools), repeat and restart = true (a new conversation).
    On top: name, title, about, keep_reasoning, prefix_reuse. The shipped ones in
    hwmodel/workloads are examples.
    """
    from hwmodel.cli_support import print_json
    from hwmodel.cost import terms_of
    from hwmodel.errors import RequestError
    from hwmodel.jobs_view import job_json, jobs_text, profiles_json, profiles_text
    from hwmodel.workload import load_profile, run_job, steps_of

    if profile is None:
        if as_json:
            print_json(profiles_json())
        else:
            click.echo(profiles_text())
        return
    if not devices:
        raise RequestError("--device is missing; name at least one machine")
    found = load_profile(profile)
    most = max(s.depth + s.reasoning + s.answer for s in steps_of(found))
    terms = {k: given.pop(k) for k in ("buy", "rent", "watts", "kwh", "years", "days", "hours")}
    jobs = []
    for name in devices:
        candidate, _, drafts = _machine(most, {**given, "device": name, "job": profile})
        jobs.append((run_job(found, candidate, drafts), terms_of(candidate, **terms)))
    if as_json:
        print_json([job_json(job, paid) for job, paid in jobs])
    else:
        click.echo(jobs_text(jobs))
