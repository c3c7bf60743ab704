"""Kinds of exercises: what several of them have in common, and no single question."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from hmmlab.exercises.rules import Exercise, Trial
from hmmlab.invariants.promise import device_letters
from hmmlab.model.region import Pages

__all__ = ["PredictNumbers", "PredictStates", "Story"]


class Story(Exercise):
    """A question that ends with the operations of this seed's story."""

    @abstractmethod
    def story(self, trial: Trial) -> Any:
        """Run the story. Returns what the other methods want to know of it."""

    def last_lines(self, told: Any) -> list[str]:
        """What stands below the story, which has returned ``told``."""
        return []

    def question(self) -> str:
        """What is asked, with the operations of this seed's story."""
        trial = self.trial()
        told = self.story(trial)
        lines = [f"  {operation.text}" for operation in trial.trace.operations]
        return "\n".join([super().question(), "", *lines, *self.last_lines(told)])


class PredictStates(Story):
    """Say what a device's table holds after a story: one letter a page.

    The learner sees the story; the answer comes from the model.
    """

    rounds = 1
    starter = 'prediction = "..."'
    answer = "prediction"

    @abstractmethod
    def story(self, trial: Trial) -> Pages:
        """Run the story. Returns the pages that are asked about."""

    def last_lines(self, told: Pages) -> list[str]:
        """How many letters there are."""
        return ["", f"{len(told)} letters."]

    def solution(self) -> str:
        """The letters that the model comes to."""
        trial = self.trial()
        return f'{self.answer} = "{device_letters(trial.machine, self.story(trial))}"'

    def rule(self, answer: Any, trial: Trial) -> None:
        """Every letter is the model's; a wrong one shows the step that made the page what it is."""
        where = self.story(trial)
        truth = device_letters(trial.machine, where)
        given = str(answer).replace("·", ".").replace(" ", "")
        if len(given) != len(truth):
            raise trial.wrong(f"{len(given)} letters for {len(truth)} pages.")
        for offset, (said, is_) in enumerate(zip(given, truth, strict=True)):
            if said != is_:
                when = self._since(trial, where[offset])
                what = f"Page {offset} is {is_!r} in the device's table, not {said!r}."
                raise trial.wrong(what, when)

    @staticmethod
    def _since(trial: Trial, page: Pages) -> int:
        """The last position at which the page's letter changed; the end where it never did."""
        since, before = len(trial.trace), None
        for replay in trial.trace.replay():
            letter = "."
            if replay.state["device_file.mm"].any():
                letter = device_letters(replay.state, page)
            if before is not None and letter != before:
                since = replay.position
            before = letter
        return since


class PredictNumbers(Exercise):
    """Say numbers, by name, that the model then counts in a story that the learner sees."""

    rounds = 1
    answer = "prediction"
    names: ClassVar[dict[str, str]]

    @abstractmethod
    def count(self, trial: Trial) -> dict[str, tuple[int, int, str]]:
        """Run the story. Returns each number, the position at which it shows, and why it is so."""

    def solution(self) -> str:
        """The numbers that the model comes to."""
        counted = self.count(self.trial())
        return f"{self.answer} = { ({name: number for name, (number, *_) in counted.items()}) }"

    def rule(self, answer: Any, trial: Trial) -> None:
        """Every number is the model's."""
        for name, (number, position, why) in self.count(trial).items():
            if name not in answer:
                raise trial.wrong(f"{name!r} is missing.", position)
            if answer[name] != number:
                raise trial.wrong(f"{name!r} is not {answer[name]}: {why}", position)
