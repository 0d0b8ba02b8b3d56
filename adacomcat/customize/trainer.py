"""Training of adapters with a handful of pictures, and with prior preservation.

    loss = mean |ε̂ - ε|² over the given pictures + w · the same over pictures of the class

ε is the noise, or the velocity where the model predicts that. Autoencoder and text encoder are
frozen, so pictures and prompts are encoded once, before the first step.
"""

import logging
import math
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adacomcat.customize.config import CustomizeConfig
from adacomcat.customize.pipeline import encode_pictures, encode_prompt, require_trainable
from adacomcat.distill.state import StateWriter, require_same_inputs, require_same_settings
from adacomcat.errors import UserError
from adacomcat.utils.distributed import Processes
from adacomcat.utils.progress import progress
from adacomcat.utils.random import derived_generator
from adacomcat.utils.stopping import Stopped, asked_to_stop

LOG = logging.getLogger(__name__)
LOGGED = 50  # steps from line to line of the log
CHOICE, NOISE = 201, 202  # parts of the seeds' keys


class Concept:
    """Pictures with one prompt, encoded.

    Args:
        pipe: what encodes.
        pictures: (N, channels, H, W) from -1 to 1.
        prompt: that describes them all.
    """

    def __init__(self, pipe: Any, pictures: Tensor, prompt: str) -> None:
        self.mean, self.std = encode_pictures(pipe, pictures)
        self.words = encode_prompt(pipe, prompt)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Latents (count, C, H, W) of random pictures."""
        chosen = torch.randint(len(self.mean), (count,), generator=generator)
        noise = torch.randn(count, *self.mean.shape[1:], generator=generator)
        return self.mean[chosen] + self.std[chosen] * noise.to(self.mean)


class CustomizeTrainer:
    """Trains ``parameters`` of a pipeline's U-Net in place; ``train`` goes to the last step.

    Every random choice is derived from (seed, step), and every step sees the same global batch on
    any number of processes, so parameters, optimiser and step are the complete state.

    Args:
        pipe: a pipeline like Stable Diffusion.
        config: all settings.
        pictures: the given ones, (N, channels, H, W) from -1 to 1.
        parameters: what is trained, with its names.
        class_pictures: those of ``config.class_prompt``.
        processes: the processes that train together.
        inputs: name → checksum of what the run began with. A state is refused where they differ.

    Raises:
        UserError: the pipeline is of another kind, or the settings do not fit.
    """

    def __init__(self, pipe: Any, config: CustomizeConfig, pictures: Tensor,
                 parameters: Mapping[str, nn.Parameter], *,
                 class_pictures: Tensor | None = None, processes: Processes | None = None,
                 inputs: Mapping[str, str] | None = None) -> None:
        require_trainable(pipe)
        self.unet, self.config = pipe.unet, config
        self.processes = processes or Processes(device=pipe.device)
        if config.batch_size < self.processes.world_size:
            raise UserError(f"batch_size {config.batch_size} leaves some of the "
                            f"{self.processes.world_size} processes without a picture; raise it")
        self.inputs, self.parameters = dict(inputs or {}), dict(parameters)
        self.noising = _noising(pipe.scheduler)
        self.concepts = [Concept(pipe, pictures, config.instance_prompt)]
        if class_pictures is not None and config.class_prompt is not None:
            self.concepts.append(Concept(pipe, class_pictures, config.class_prompt))
        self.optimizer = torch.optim.AdamW(list(self.parameters.values()), config.lr,
                                           weight_decay=config.weight_decay)
        self.writer = None
        if config.state_dir is not None and self.processes.first:
            self.writer = StateWriter(config.state_dir)
        self.step = 0
        self.losses: list[float] = []
        self.seconds = 0.0

    def train(self, sample: Callable[[int], None] | None = None) -> None:
        """Every step that is left.

        Args:
            sample: called with the number of steps done, after each ``config.sample_steps``.

        Raises:
            Stopped: a signal asked for it; the state is saved.
            UserError: the loss diverges, or a state cannot be written.
        """
        config = self.config
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.unet.train()
        left = range(self.step, config.steps)
        for _ in progress(left, "customising", total=len(left)):
            start = time.perf_counter()
            self.losses.append(self._train_step())
            self.step += 1
            self.seconds += time.perf_counter() - start
            self.processes.reached(f"step {self.step}")
            self._log()
            if sample is not None and config.sample_steps and self.step % config.sample_steps == 0:
                self.unet.eval()
                sample(self.step)
                self.unet.train()
            self._after_step()
        self.unet.eval()
        if self.writer is not None:
            self.writer.finish()

    def _train_step(self) -> float:
        """One update; the loss, a mean over all processes."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * (1 - self.step / config.steps)
        loss = self._loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.processes.average_gradients_(self.parameters.values())
        nn.utils.clip_grad_norm_(self.parameters.values(), config.clip_grad or math.inf)
        self.optimizer.step()
        mean = self.processes.mean(loss)
        if not mean < float("inf"):
            raise UserError(f"the loss is {mean} at step {self.step}; a lower lr may mend it")
        return mean

    def _loss(self) -> Tensor:
        """Of this process's rows; its mean over all processes is that over the global batch."""
        config, processes = self.config, self.processes
        generator = derived_generator(config.seed, NOISE, self.step)
        count, rows = config.batch_size, slice(processes.rank, None, processes.world_size)
        clean = torch.cat([concept.draw(count, generator)[rows] for concept in self.concepts])
        wide = len(self.concepts) * count
        noise = torch.randn(wide, *clean.shape[1:], generator=generator)
        times = torch.randint(self.noising.config.num_train_timesteps, (wide,), generator=generator)
        noise, times = (torch.cat([part[rows] for part in drawn.split(count)]).to(clean.device)
                        for drawn in (noise, times))
        noisy = self.noising.add_noise(clean, noise, times)
        share = len(clean) // len(self.concepts)
        words = torch.cat([concept.words.expand(share, -1, -1) for concept in self.concepts])
        with torch.autocast(clean.device.type, torch.bfloat16, enabled=config.amp):
            found = self.unet(noisy, times, words).sample
        wanted = noise
        if self.noising.config.prediction_type == "v_prediction":
            wanted = self.noising.get_velocity(clean, noise, times)
        losses = F.mse_loss(found.float(), wanted, reduction="none").flatten(1).mean(1).split(share)
        weights = (1.0, config.prior_weight)
        total = torch.stack([w * part.mean() for w, part in zip(weights, losses, strict=False)])
        return processes.share(share, count) * total.sum()

    def _log(self) -> None:
        if not self.processes.first or (self.step % LOGGED and self.step < self.config.steps):
            return
        latest = self.losses[-LOGGED:]
        left = self.seconds / len(self.losses) * (self.config.steps - self.step)
        LOG.info("step %d of %d: loss %.4f, %.0f s, %.0f s left", self.step, self.config.steps,
                 sum(latest) / len(latest), self.seconds, left)

    def _after_step(self) -> None:
        """Save where it is time, and end where a signal asks for it."""
        asked, every = asked_to_stop(), self.config.checkpoint_steps
        if self.processes.any(asked is not None):
            self.save()
            if self.writer is not None:
                self.writer.finish()
            raise Stopped(asked or signal.SIGTERM, f"step {self.step}")
        due = self.writer is not None and self.writer.is_due(self.config.checkpoint_seconds)
        if due or (every and self.step % every == 0):
            self.save()

    def save(self) -> None:
        """Hand the state to the thread that writes it, where the settings name a folder for it."""
        if self.writer is not None:
            self.writer.write(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Settings, trained parameters, optimiser and position."""
        return {"config": self.config.identity(), "inputs": self.inputs,
                "parameters": dict(self.parameters), "optimizer": self.optimizer.state_dict(),
                "step": self.step, "losses": self.losses, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``.

        Raises:
            UserError: it was made with other settings, pictures, or another model.
        """
        try:
            require_same_settings(self.config.identity(), state["config"])
            require_same_inputs(self.inputs, state["inputs"])
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(state["parameters"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.losses = state["step"], list(state["losses"])
            self.seconds = state["seconds"]
        except UserError:
            raise
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"the training state is of another model or version ({error}); remove "
                            "it and begin anew") from error


def _noising(scheduler: Any) -> Any:
    """The scheduler that adds noise in training, with the betas of the one that removes it.

    Raises:
        UserError: it is of another kind, like those of flow matching.
    """
    from diffusers import DDPMScheduler
    if not hasattr(scheduler.config, "beta_start") or scheduler.config.prediction_type not in (
            "epsilon", "v_prediction"):
        raise UserError(f"training knows schedulers with betas that predict noise or velocity, not "
                        f"{type(scheduler).__name__}")
    return DDPMScheduler.from_config(scheduler.config)
