"""Which guesses the next pass computes, and what became of them. One owner, the engine's thread.

Guesses are made and compared with what is drawn whether a pass computes them or not: how often they
are right is known without a row; but for those of a layer, which cost time. What a row costs is
measured in passes with and without. None of it changes a token: a guess counts only where it is
what the sampler draws.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from windlass.engine.draft_costs import Chances, Guard, Mean, RowCost, most_useful
from windlass.engine.drafts import Drafter, Guess, LayerGuess, PromptLookup
from windlass.engine.engine_stats import DraftStats
from windlass.engine.sequence import Sequence
from windlass.phases import PhaseStats
from windlass.schedule.batch import Segment
from windlass.speculative import SpeculativeConfig

_NOTHING = Guess((), 0)
_LAST = 64  # proposals that a note speaks of
# What is believed of a layer's guess before any was compared: 0.85 to 0.9 are reported of
# DeepSeek-V3's (arXiv 2412.19437, section 5.4.3)
_BELIEVED = 0.8


@dataclass(slots=True)
class _Follower:
    """What is guessed of one sequence. `watched`: a guess that is compared with what comes, of
    which `num_right` came."""

    drafter: Drafter
    chances: Chances
    num_known: int = 0  # tokens that the drafter has
    watched: Guess = _NOTHING
    num_right: int = 0


class _State:
    """What passes of equally many sequences cost."""

    def __init__(self, sequences: int) -> None:
        self.cost = RowCost(sequences)
        self.guard = Guard()


class Drafting:
    """Guesses for all sequences of an engine, at most `most` tokens for each."""

    def __init__(self, most: int, make: Callable[[], Drafter], *, is_heard: bool = False) -> None:
        """`is_heard`: guesses cost time, so that they are made only while they are wanted: none in
        windows without, all in windows with, whose seconds count theirs."""
        self.most = most
        self._make = make
        self._is_heard = is_heard
        self._followers: dict[int, _Follower] = {}  # by a sequence's number
        self._chances = Chances(believed=_BELIEVED if is_heard else 0.0)  # of all sequences
        self._states: dict[int, _State] = {}  # by the number of decoding sequences
        self._state = _State(1)  # of the last pass, which the next is likely to be as
        self._could_guess = False  # for some sequence of the next pass
        self._first = Mean(_LAST)  # chance of the first guess
        self._known_rows: set[int] = set()
        self._proposed = self._accepted = self._num_with = self._num_without = 0

    @classmethod
    def of(cls, config: SpeculativeConfig) -> "Drafting":
        if config.method == "mtp":
            return cls(config.num_speculative_tokens, LayerGuess, is_heard=True)
        return cls(config.num_speculative_tokens, lambda: PromptLookup(config))

    @property
    def wants_guesses(self) -> bool:
        """Whether the next pass is to have guesses that cost time."""
        return self._state.guard.is_on

    def hear(self, sequence: Sequence, token_id: int) -> None:
        """What the model's own layer guesses of the token after the sequence's last."""
        drafter = self._follow(sequence).drafter
        assert isinstance(drafter, LayerGuess), "a guess that nobody asked for"
        drafter.hear(token_id)

    def propose(self, sequence: Sequence) -> tuple[int, ...]:
        """Tokens that are worth a row each behind the sequence's last; none while they do not
        pay."""
        follower = self._follow(sequence)
        guess = follower.drafter.guess(self.most)
        if follower.num_right == len(follower.watched.token_ids):
            follower.watched, follower.num_right = guess, 0
        chances = follower.chances.together(guess.kind, len(guess.token_ids))
        if chances or not self._is_heard:
            self._first.add(chances[0] if chances else 0.0)
        self._could_guess |= self._is_heard
        cost, guard = self._state.cost, self._state.guard
        if not chances or chances[0] <= cost.hoped:
            return ()
        self._could_guess = True
        if not guard.is_on:
            return ()
        count = 1 if guard.is_trial else most_useful(chances, cost.value())
        return guess.token_ids[:count]

    def _follow(self, sequence: Sequence) -> _Follower:
        """Knows all tokens of the sequence."""
        follower = self._followers.get(sequence.number)
        if follower is None:
            follower = _Follower(self._make(), Chances(self._chances))
            follower.drafter.extend(sequence.request.prompt_token_ids)
            follower.num_known = sequence.num_prompt
            self._followers[sequence.number] = follower
        new = sequence.output_ids[follower.num_known - sequence.num_prompt :]
        follower.drafter.extend(new)
        follower.num_known += len(new)
        self._compare(follower, new)
        return follower

    def _compare(self, follower: _Follower, new: list[int]) -> None:
        guess = follower.watched
        for token in new:
            if follower.num_right == len(guess.token_ids):
                return
            is_right = guess.token_ids[follower.num_right] == token
            follower.chances.add(guess.kind, follower.num_right, is_right)
            if is_right:
                follower.num_right += 1
            else:
                follower.watched, follower.num_right = _NOTHING, 0
                return

    def count(self, proposed: int, accepted: int) -> None:
        """Rows that were computed for guesses of one sequence, and those that were right."""
        self._proposed += proposed
        self._accepted += accepted

    def forget(self, sequence: Sequence) -> None:
        """It has ended, or is not to be followed for now."""
        self._followers.pop(sequence.number, None)

    def passed(self, segments: Iterable[Segment], took: PhaseStats) -> None:
        """A pass has ended, and what it took. Learns of those that compute guesses and one row of
        each sequence, no prompts and nothing again."""
        could_guess, self._could_guess = self._could_guess, False
        sequences = rows = 0
        for one in segments:
            if one.is_prompt or one.num_tokens != 1 + one.num_drafts:
                return
            sequences, rows = sequences + 1, rows + one.num_drafts
        if sequences not in self._states:
            self._states[sequences] = _State(sequences)
        self._state = self._states[sequences]
        self._num_with += rows > 0
        self._num_without += could_guess and not rows
        if sequences + rows not in self._known_rows:  # layers are captured in it, memory is made
            self._known_rows.add(sequences + rows)
            return
        seconds = self._state.cost.add(took.seconds, took.wait_s, rows)
        if could_guess:
            self._state.guard.add(seconds, took.output_tokens, rows)

    def stats(self) -> DraftStats:
        return DraftStats(
            proposed=self._proposed,
            accepted=self._accepted,
            passes=self._num_with,
            passes_without=self._num_without,
            note=self._note(),
        )

    def _note(self) -> str:
        cost = self._state.cost
        how = "measured" if cost.is_measured else "expected"
        said = (
            f"of first guesses {100 * self._first.value():.0f} % are likely right, a row costs"
            f" {cost.value():.2f} tokens ({how})"
        )
        return said if self._state.guard.is_on else f"off: {said}"
