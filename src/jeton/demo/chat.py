"""How the demo model is spoken to: the words of a conversation, as a function and as the same Jinja chat template."""

from __future__ import annotations

from collections.abc import Sequence

EOS = "</s>"

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{{ 'USER: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}"
    "{{ ' ASSISTANT:' }}"
    "{% else %}"
    "{{ ' ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '" + EOS + "' }}"
    "{% endif %}"
    "{% endfor %}"
)


def user_turn(question: str, first: bool) -> str:
    """The text of one question; the first one of a conversation carries the image."""
    return f"USER: {'<image>' + chr(10) if first else ''}{question} ASSISTANT:"


def assistant_turn(answer: str) -> str:
    """The text of one finished answer."""
    return f" {answer}{EOS}"


def prompt(question: str, history: Sequence[tuple[str, str]] = ()) -> str:
    """Prompt that ends where the model is to answer `question`.

    Args:
        question: what is asked now.
        history: earlier (question, answer) pairs about the same image, oldest first.
    """
    questions = [asked for asked, _ in history] + [question]
    answers = [assistant_turn(answer) for _, answer in history] + [""]
    return "".join(user_turn(q, first=i == 0) + a for i, (q, a) in enumerate(zip(questions, answers)))
