"""VDCscore: how much of a long caption is right, asked of a judge question by question."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Judge = Callable[[str], str]
Pairs = Sequence[tuple[str, str]]  # questions with the answers that the reference caption gives

ASK = (
    "Here is a description of a video.\n\n{caption}\n\nAnswer this question from the description alone, in a few words. Say "
    '"not mentioned" if the description does not tell.\n\nQuestion: {question}\nAnswer:'
)
GRADE = (
    "A question about a video has this correct answer. Someone who saw only a description gave another one.\n\nQuestion: "
    "{question}\nCorrect answer: {answer}\nTheir answer: {said}\n\nDo the two mean the same? Reply with JSON alone: "
    '{{"pred": "yes" or "no", "score": a whole number from 0 (nothing right) to 5 (the same)}}.'
)
MAKE = (
    "Here is a description of a video.\n\n{caption}\n\nWrite {count} short questions that it answers, each about one fact, with "
    'answers of a few words. Reply with a JSON list alone: [{{"question": ..., "answer": ...}}, ...].'
)


class Unread(ValueError):
    """What a judge said could not be read."""


@dataclass(frozen=True)
class Video:
    """One video: `right` of `asked` questions (what the judge's grade did not say clearly counts as wrong, with score 0), the
    mean score, and how many grades were `unread`."""

    name: str
    right: int
    asked: int
    score: float
    unread: int

    @property
    def accuracy(self) -> float:
        return self.right / self.asked


@dataclass(frozen=True)
class VDCScore:
    """Means over videos, those with nothing right included: `accuracy` in 0..1 and `score` in 0..5."""

    videos: tuple[Video, ...]

    @property
    def accuracy(self) -> float:
        return sum(video.accuracy for video in self.videos) / len(self.videos)

    @property
    def score(self) -> float:
        return sum(video.score for video in self.videos) / len(self.videos)

    @property
    def unread(self) -> int:
        return sum(video.unread for video in self.videos)


def vdcscore(captions: Mapping[str, str], questions: Mapping[str, Pairs], judge: Judge) -> VDCScore:
    """The score of predicted `captions` by the name of their video; `questions` as `make_questions` and `read_questions` give.

    For each question the judge, any function from a prompt to a text, first answers it from the predicted caption alone, then
    says whether this is the reference's answer ("yes" or "no") and grades it from 0 to 5. Accuracy is the share of "yes" and
    score the mean grade of a video; both are averaged over videos. The released script leaves out videos whose accuracy or score
    is 0, and questions whose grade it cannot read: here all count, and `unread` says how many grades could not be read. A video
    that has questions but no caption is an error.
    """
    missing = [name for name in questions if name not in captions]
    if missing or not questions:
        raise ValueError(f"there is no caption of {missing[0]!r}." if missing else "there are no questions to ask.")
    return VDCScore(tuple(_video(name, captions[name], pairs, judge) for name, pairs in questions.items()))


def _video(name: str, caption: str, pairs: Pairs, judge: Judge) -> Video:
    if not pairs:
        raise ValueError(f"there is no question about {name!r}.")
    right, total, unread = 0, 0, 0
    for question, answer in pairs:
        said = judge(ASK.format(caption=caption.strip() or "(nothing is described)", question=question)).strip()
        try:
            yes, grade = grade_of(judge(GRADE.format(question=question, answer=answer, said=said or "not mentioned")))
        except Unread:
            yes, grade, unread = False, 0, unread + 1
        right, total = right + yes, total + grade
    return Video(name, right, len(pairs), total / len(pairs), unread)


def grade_of(text: str) -> tuple[bool, int]:
    """(yes, 0..5) in a judge's text: {"pred": "yes", "score": 4}, in single quotes or among words too. Raises `Unread`."""
    pred = re.search(r"""["']?pred["']?\s*[:=]\s*["']?(yes|no)\b""", text, re.IGNORECASE)
    score = re.search(r"""["']?score["']?\s*[:=]\s*["']?(\d+)(?![\d.])""", text, re.IGNORECASE)
    if pred is None or score is None or int(score[1]) > 5:
        raise Unread(f'a grade is {{"pred": "yes" or "no", "score": 0 to 5}}, the judge said {text[:200]!r}.')
    return pred[1].lower() == "yes", int(score[1])


def make_questions(caption: str, judge: Judge, count: int = 20) -> list[tuple[str, str]]:
    """Questions with answers, made once from a reference caption. Raises `Unread` where the judge gives no such list."""
    said = judge(MAKE.format(caption=caption, count=count))
    listed = re.search(r"\[.*\]", said, re.DOTALL)
    try:
        return [(str(pair["question"]), str(pair["answer"])) for pair in json.loads(listed[0] if listed else "")]
    except (ValueError, TypeError, KeyError) as error:
        raise Unread(f"a list of questions with answers was asked for, the judge said {said[:200]!r}.") from error


def read_questions(path: str | os.PathLike[str]) -> dict[str, list[tuple[str, str]]]:
    """Questions of a benchmark from JSONL: a line for each video with its name (`video_name`, `video_id` or `video`) and a
    `qa_list`, a list of {"question", "answer"}. Raises ValueError with the number of a line that cannot be used."""
    found: dict[str, list[tuple[str, str]]] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name = next(row[key] for key in ("video_name", "video_id", "video") if key in row)
            found[str(name)] = [(str(pair["question"]), str(pair["answer"])) for pair in row["qa_list"]]
        except (ValueError, TypeError, KeyError, StopIteration) as error:
            raise ValueError(
                f"{Path(path).name}, line {number}: needs video_name and qa_list of questions and answers."
            ) from error
    if not found:
        raise ValueError(f"{Path(path).name} holds no questions.")
    return found
