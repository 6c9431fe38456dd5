"""How each family of chat templates spells tool calls."""

from enum import StrEnum


class ToolFamily(StrEnum):
    """Which spelling a template's model was trained on; PLAIN: the template knows no tools, Hermes is used."""

    LLAMA3 = "llama3"
    HERMES = "hermes"
    MISTRAL = "mistral"
    PLAIN = "plain"


def detect_family(chat_template: str | None) -> ToolFamily:
    """Read the family off the template's text."""
    return ToolFamily.PLAIN
