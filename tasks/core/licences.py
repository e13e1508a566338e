"""Licences of models and data: which uses they allow, and which licence what is made from several of them has.

No legal advice, and no reading of licence texts: names, as the Hub's cards have them, are looked up in a list. One that
is not in it is said to be unknown.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from tasks.core.config import Use
from tasks.core.errors import ConfigError
from tasks.core.records import LicenceRef

Kind = Literal["public domain", "permissive", "share-alike", "conditions", "non-commercial", "research", "unknown"]

_NAMES: dict[Kind, str] = {
    "public domain": "cc0-1.0 pddl unlicense wtfpl",
    "permissive": (
        "apache-2.0 mit afl-3.0 apple-ascl artistic-2.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 "
        "cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cdla-permissive-1.0 cdla-permissive-2.0 ecl-2.0 etalab-2.0 isc "
        "lppl-1.3c ms-pl ncsa odc-by ofl-1.1 openmdw-1.0 postgresql zlib"
    ),
    "share-alike": (
        "agpl-3.0 cc-by-sa-3.0 cc-by-sa-4.0 cdla-sharing-1.0 epl-1.0 epl-2.0 eupl-1.1 eupl-1.2 gfdl gpl gpl-2.0 "
        "gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 lgpl-lr mpl-2.0 odbl osl-3.0"
    ),
    "non-commercial": (
        "cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 "
        "cc-by-nc-sa-4.0"
    ),
    "research": (
        "apple-amlr deepfloyd-if-license fair-noncommercial-research-license h-research intel-research llama mnpl mrl "
        "qwen-research tongyi-qianwen-research"
    ),
}
_META = "Meta's notice and acceptable-use policy go with it, and above 700 million users a month Meta is to be asked"
_LLAMA = f"{_META}; its name begins with Llama and it says Built with Llama"
_NO_IMPROVING = "its answers may improve no other language models"
_NO_EU = "nobody in the European Union has a right to its multimodal models"
_NOT_SHARED = "what is adapted from it may not be shared"
_RAIL = "the restrictions of use in the licence go with it"
_TERMS = {
    "llama2": f"{_META}; {_NO_IMPROVING}",
    "llama3": f"{_META}; its name begins with Llama 3 and it says Built with Meta Llama 3; {_NO_IMPROVING}",
    "llama3.1": _LLAMA,
    "llama3.2": f"{_LLAMA}; {_NO_EU}",
    "llama3.3": _LLAMA,
    "llama4": f"{_LLAMA}; {_NO_EU}",
    "gemma": "Google's terms and its prohibited-use policy go with it",
    "tongyi-qianwen": "above 100 million users a month Alibaba Cloud is to be asked",
    "qwen": "above 100 million users a month Alibaba Cloud is to be asked",
    "grok2-community": "xAI's acceptable-use policy goes with it, and above a revenue it names xAI is to be asked",
    "cc-by-nd-4.0": _NOT_SHARED,
    "cc-by-nc-nd-3.0": _NOT_SHARED,
    "cc-by-nc-nd-4.0": _NOT_SHARED,
    "c-uda": "the data are for computation alone",
    **dict.fromkeys(("openrail", "openrail++", "bigcode-openrail-m", "creativeml-openrail-m", "deepseek"), _RAIL),
    **dict.fromkeys(("bigscience-bloom-rail-1.0", "bigscience-openrail-m"), _RAIL),
}
_KINDS: dict[str, Kind] = dict.fromkeys(_TERMS, "conditions")
_KINDS |= {name: kind for kind, names in _NAMES.items() for name in names.split()}
_TERMS |= dict.fromkeys(_NAMES["share-alike"].split(), "what is adapted from it and shared stays under it")
_NOT_THE_HUBS = {
    "llama",
    "mnpl",
    "mrl",
    "deepseek",
    "qwen",
    "tongyi-qianwen",
    "qwen-research",
    "tongyi-qianwen-research",
}
"""Names of models' cards that the Hub's own list of licences does not have: there the licence is `other`."""
_ALIASES = {
    **dict.fromkeys(("apache", "apache2", "apache-2"), "apache-2.0"),
    **{name: f"{name}-4.0" for name in ("cc-by", "cc-by-sa", "cc-by-nc", "cc-by-nc-sa", "cc-by-nc-nd", "cc-by-nd")},
    "cc0": "cc0-1.0",
    "odc-by-1.0": "odc-by",
    "odbl-1.0": "odbl",
    "bsl": "bsl-1.0",
    "gemma-terms-of-use": "gemma",
}
_FORBIDDEN: dict[Kind, set[Use]] = {"non-commercial": {"commercial"}, "research": {"commercial", "private"}}


@dataclass(frozen=True)
class Licence:
    """`name`: the Hub's or a model card's; as it was stated where it is unknown. `terms`: what it asks, in words."""

    name: str
    kind: Kind
    terms: str = ""

    @property
    def is_open(self) -> bool:
        """Whether it asks no more than to be named."""
        return self.kind in ("public domain", "permissive")


@dataclass(frozen=True)
class CardLicence:
    """What a model card says of its licence: the Hub's id, the name beside `other`, and why, in a sentence."""

    id: str
    name: str | None
    reason: str


def find_licence(stated: str | None) -> Licence:
    """Return what is known of a licence by the name that a card, a GGUF file or a recipe states."""
    name = re.sub(r"[\s_]+", "-", (stated or "").strip().lower())
    name = re.sub(r"^(the|meta)-|-(only|or-later|international)$", "", name)
    name = re.sub(r"-community-licen[sc]e(-agreement)?$", "", name)
    name = re.sub(r"^llama-(?=\d)", "llama", name)
    name = re.sub(r"^([al]?gpl)-?v?(\d)(\.0)?$", r"\1-\2.0", name)
    for known in (name, re.sub(r"-licen[sc]e(?=-|$)", "", name)):
        known = _ALIASES.get(known, known)
        if known in _KINDS:
            return Licence(known, _KINDS[known], _TERMS.get(known, ""))
    return Licence((stated or "").strip() or "not stated", "unknown")


def licence_of_card(card: str) -> str | None:
    """Return the licence that the metadata of a Hub card (README.md) state, by its own name where they say other."""
    found = re.match(r"\s*---\r?\n(.*?)\r?\n---", card, re.S)
    try:
        metadata: Any = yaml.safe_load(found.group(1)) if found else None
    except yaml.YAMLError:
        return None
    stated = metadata.get("license") if isinstance(metadata, dict) else None
    if stated == "other":
        stated = metadata.get("license_name") or stated
    return ", ".join(map(str, stated)) if isinstance(stated, list) else str(stated) if stated else None


def check_use(use: Use | None, licences: list[LicenceRef]) -> list[str]:
    """Return, in a sentence each, where the licences do not allow the declared use, or ask for more than to be named,
    and which are unknown; with no use declared, only those that allow no commercial one. Raises ConfigError where
    commercial use is declared and not allowed."""
    notes, refused = [], []
    for ref in licences:
        licence = find_licence(ref.license)
        forbidden = _FORBIDDEN.get(licence.kind, set())
        what = f"{ref.name} is under {licence.name}, which allows"
        only = "no commercial use" if licence.kind == "non-commercial" else "use in research alone"
        if forbidden and use == "commercial":
            refused.append(
                f"export.use is commercial, but {what} {only}. Take another {ref.what}, set export.use to research, "
                f"or correct {ref.key} if you have other terms."
            )
        elif use in forbidden or (forbidden and use is None):
            notes.append(f"{f'export.use is {use}, but ' if use else ''}{what} {only}.")
        elif licence.terms and use in ("commercial", "research"):
            notes.append(f"{what} {use} use on conditions: {licence.terms}.")
    if refused:
        raise ConfigError(refused)
    if use and (unknown := [ref for ref in licences if find_licence(ref.license).kind == "unknown"]):
        names = ", ".join(f"{ref.name} ({find_licence(ref.license).name})" for ref in unknown)
        keys = " and ".join(dict.fromkeys(ref.key for ref in unknown))
        notes.append(f"It is unknown whether {use} use is allowed by the licence of {names}: state it as {keys}.")
    return notes


def derive_licence(licences: list[LicenceRef]) -> CardLicence:
    """Return the licence of a model made from a base (the first) and data: the strictest of them, or `other` where it
    is unknown or several bind at once."""
    found = [find_licence(ref.license) for ref in licences]
    binding = {licence.name: licence for licence in found if not licence.is_open}
    if not binding:
        named = [licence.name for licence in found if licence.kind == "permissive"] or [found[0].name]
        return CardLicence(named[0], None, f"Base and data are under open licences: {_listed(licences)}.")
    reason = f"Base and data: {_listed(licences)}."
    if len(binding) > 1:
        reason += " These bind together."
    if any(licence.kind == "unknown" for licence in found):
        reason += " What a licence that is not stated, or not known here, allows is to be asked of its owner."
    reason += "".join(f" {x.name}: {x.terms}." for x in binding.values() if x.terms)
    name = "-and-".join(re.sub(r"[^a-z0-9.-]+", "-", name.lower()) for name in binding)
    (only, *others) = binding.values()
    if others or only.kind == "unknown" or only.name in _NOT_THE_HUBS:
        return CardLicence("other", name, reason)
    return CardLicence(only.name, None, reason)


def _listed(licences: list[LicenceRef]) -> str:
    return ", ".join(f"{ref.name} ({find_licence(ref.license).name})" for ref in licences)
