"""What happened, for Prefect's automations: events named forgetless.<what>, with what a notification would say."""

from typing import Any

from prefect.events import emit_event


def announce(what: str, about: str, **payload: Any) -> None:
    """Emit the event forgetless.<what> about a run, model or recipe."""
    emit_event(f"forgetless.{what}", resource={"prefect.resource.id": f"forgetless.{about}"}, payload=payload)


def announce_promoted(name: str, alias: str, run: str) -> None:
    """Emit forgetless.model.promoted: an alias of the registry came to name a run's model."""
    announce("model.promoted", f"model.{name}", name=name, alias=alias, run=run, text=f"{name}:{alias} is run {run}.")
