"""Settings of a customisation."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from adacomcat.errors import UserError
from adacomcat.utils.limits import CUSTOMIZATION, INITS, require, require_kinds

# Settings that do not decide what is learnt.
_APART = ("checkpoint_steps", "checkpoint_seconds", "state_dir", "resume", "sample_steps", "alpha")


@dataclass(frozen=True)
class CustomizeConfig:
    """Settings of ``train``.

    Args:
        instance_prompt: describes the given pictures, with ``token`` in it.
        token: the word of the prompt that shall call what was learnt.
        class_prompt: describes what the pictures are a kind of, without the token; with it the
            model keeps what it knows of that kind. None: nothing is kept.
        prior_weight: w in loss = loss of the given pictures + w · loss of the class.
        num_class_images: pictures of the class that the model makes before it is trained.
        rank: the columns that each head gets.
        init: 'zero' begins at what the model computes, 'linear' is the published start.
        steps: updates of the adapters.
        batch_size: given pictures in a step over all processes, and as many of the class.
        lr: the learning rate at the start; it falls linearly to 0.
        weight_decay: the optimiser's.
        clip_grad: the largest norm of the gradient; 0: any.
        alpha: written into the file, to use the adapters with.
        resolution: side of the pictures in pixels; None: the model's.
        amp: bfloat16 autocast.
        gradient_checkpointing: compute activations twice, in much less memory.
        sample_steps: make sample pictures every so many steps; 0: never.
        seed: of all random choices.
        state_dir: where the state of training goes; None: nowhere.
        checkpoint_steps: write it every so many steps, too; 0: time decides.
        checkpoint_seconds: write it when it is older, too.
        resume: go on from the state in ``state_dir``, where there is one.
    """

    instance_prompt: str
    token: str = "sks"
    class_prompt: str | None = None
    prior_weight: float = 1.0
    num_class_images: int = 100
    rank: int = 2
    init: str = "zero"
    steps: int = 500
    batch_size: int = 1
    lr: float = 2.5e-3
    weight_decay: float = 1e-2
    clip_grad: float = 1.0
    alpha: float = 1.0
    resolution: int | None = None
    amp: bool = False
    gradient_checkpointing: bool = False
    sample_steps: int = 0
    seed: int = 0
    state_dir: str | None = None
    checkpoint_steps: int = 0
    checkpoint_seconds: float = 60.0
    resume: bool = False

    def checked(self) -> "CustomizeConfig":
        """These settings.

        Raises:
            UserError: a value is wrong; the message names it.
        """
        require(self, CUSTOMIZATION, optional=("resolution",))
        require_kinds(self, instance_prompt=str, token=str, amp=bool, gradient_checkpointing=bool,
                      resume=bool)
        if self.init not in INITS:
            raise UserError(f"unknown init {self.init!r:.40}; choose one of "
                            f"{', '.join(INITS)}")
        if not self.token.strip() or len(self.token.split()) > 1:
            raise UserError(f"token must be one word; got {self.token!r:.40}")
        require_token(self.instance_prompt, self.token)
        if self.class_prompt is not None and has_word(self.class_prompt, self.token):
            raise UserError(f"the class prompt {self.class_prompt!r:.80} must describe the kind "
                            f"without the token {self.token!r:.40}")
        return self

    def with_(self, **changes: Any) -> "CustomizeConfig":
        """A checked copy with other values."""
        return replace(self, **changes).checked()

    def identity(self) -> dict[str, object]:
        """The settings that decide what is learnt."""
        return {name: value for name, value in asdict(self).items() if name not in _APART}


def has_word(prompt: str, token: str) -> bool:
    """Whether ``token`` is a word of the prompt, maybe with punctuation behind it."""
    return any(word == token or word.rstrip(".,;:!?") == token for word in prompt.split())


def require_token(prompt: str, token: str | None) -> None:
    """Raise a ``UserError`` where a prompt does not name the token that adapters learnt."""
    if token is not None and not has_word(prompt, token):
        raise UserError(f"the prompt {prompt!r:.80} lacks the token {token!r:.40}, which calls "
                        f"what was learnt; put it in, like 'a photo of a {token:.40} dog'")
