"""Renders a chat template from standard input in a process that may take little time and memory.

Run as a program by tasks/models/template.py, which reads the exit code: 0 where every conversation was rendered or
refused by the template, LONG where it took too much memory or wrote too much, or the system's signal. Imports nothing
of this project.
"""

import json
import resource
import sys
from typing import Any

from jinja2 import ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONG = 3
LONGEST_CHARS = 1_000_000  # of conversations of a few words: templates write some hundred characters around them
SECONDS = 3
MEMORY_BYTES = 1 << 30


class Generation(ext.Extension):
    """`{% generation %}`, which marks an answer, as what is inside."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own way to say it

    def parse(self, parser: Any) -> Any:
        parser.stream.skip(1)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def refuse(message: str) -> None:
    raise ValueError(message)


def main() -> int:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: form}
    words = {name: f"<{name}>" for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    turns = [{"role": role, "content": "x"} for role in ("system", "user", "assistant", "user", "assistant")]
    try:
        template = environment.from_string(sys.stdin.read())
    except MemoryError:  # jinja works constants out as it reads them
        return LONG
    except Exception:  # no template at all, which whoever renders it says
        return 0
    for messages in (turns[1:2], turns[1:], turns[:2], turns, [turns[1]] * 20):
        for answer_next in (True, False):
            length = 0
            try:
                for piece in template.generate(messages=messages, add_generation_prompt=answer_next, **words):
                    length += len(piece)
                    if length > LONGEST_CHARS:
                        return LONG
            except MemoryError:
                return LONG
            except Exception:  # its refusal of these turns, as above
                continue
    return 0


if __name__ == "__main__":
    sys.exit(main())
