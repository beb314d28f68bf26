"""Trust-region behavior blending, whole, in one file of plain torch.

    python examples/minimal_loop.py --steps 60

Distils the tiny arithmetic student shipped with trb. No TRL, no KV cache, no chunking, bisection instead of Newton:
everything the library does faster is written here the short way. From trb it takes the models, the problems and
the counter-based random numbers, so that a test can hold `TRBTrainer` to the completions and losses of this loop.

Shape suffixes: B rollouts, L padded length, V shared vocabulary.
"""

import argparse
import math
from dataclasses import dataclass

import torch

from trb import zoo
from trb.sampling.uniforms import as_int64, prompt_key, stream_seed, uniforms


@dataclass
class Settings:
    initial_kl_budget: float = 0.5  # ε0, nats per token
    blend_warmup_steps: int = 30  # K
    learning_rate: float = 3e-4
    max_new_tokens: int = 48
    rollouts_per_prompt: int = 4
    top_k: int = 16
    seed: int = 42


def shared_log_probs(logits, rows, student_stop, teacher_stop):
    """Cut both heads to the rows they share; fold the two stop ids into the student's."""
    logits = logits[..., :rows].float()
    shared = logits.clone()
    shared[..., student_stop] = torch.logaddexp(logits[..., student_stop], logits[..., teacher_stop])
    shared[..., teacher_stop] = -math.inf
    return shared.log_softmax(-1)


def geometric(log_student, log_teacher, weight):
    path = (1 - weight)[:, None] * log_student + weight[:, None] * log_teacher
    return torch.where(log_student.isinf(), -math.inf, path).log_softmax(-1)


def kl(log_p, log_q):
    return torch.where(log_p.isinf(), 0.0, log_p.exp() * (log_p - log_q)).sum(-1)


def blend(log_student, log_teacher, budget):
    """The policy closest to the teacher with KL(policy || student) ≤ budget: bisection on the geometric path."""
    if budget == 0:
        return log_student
    low = torch.zeros(len(log_student))
    high = torch.ones(len(log_student))
    for _ in range(30):
        middle = (low + high) / 2
        feasible = kl(geometric(log_student, log_teacher, middle), log_student) <= budget
        low, high = torch.where(feasible, middle, low), torch.where(feasible, high, middle)
    reached = kl(log_teacher, log_student) <= budget
    return torch.where(reached[:, None], log_teacher, geometric(log_student, log_teacher, low))


def inverse_cdf(probs, u):
    cumulative = probs.double().cumsum(-1)
    return torch.searchsorted(cumulative, (u * cumulative[:, -1])[:, None], right=True).squeeze(-1)


def draw(log_student, log_policy, u):
    """Draft from the student, keep with probability min(1, policy / student), else draw what the policy has more of."""
    student, policy = log_student.exp(), log_policy.exp()
    draft = inverse_cdf(student, u[:, 0])[:, None]
    keep = u[:, 1] * student.gather(-1, draft).squeeze(-1).double() < policy.gather(-1, draft).squeeze(-1)
    excess = (policy - student).clamp_min(0) + 1e-30  # the constant only matters where nothing is rejected
    return torch.where(keep, draft.squeeze(-1), inverse_cdf(excess, u[:, 2]))


class Distillation:
    """A student, a frozen teacher, and the loop between them."""

    def __init__(self, student, teacher, settings):
        self.student, self.teacher, self.settings = student, teacher, settings
        self.rows = min(student.config.vocab_size, teacher.config.vocab_size)
        self.stops = student.generation_config.eos_token_id, teacher.generation_config.eos_token_id
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=settings.learning_rate, weight_decay=0.0)

    def log_probs(self, model, ids_BL, mask_BL):
        positions = (mask_BL.cumsum(-1) - 1).clamp_min(0)
        logits = model(input_ids=ids_BL, attention_mask=mask_BL, position_ids=positions).logits
        return shared_log_probs(logits, self.rows, *self.stops)

    def budget(self, step):
        return self.settings.initial_kl_budget * max(0.0, 1 - step / max(1, self.settings.blend_warmup_steps))

    @torch.no_grad()
    def rollouts(self, prompts, step):
        """Left-padded ids and masks of B prompts with their completions, drawn from the behavior policy."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        keys = as_int64([prompt_key(prompt) for prompt in prompts], ids.device)
        index = torch.arange(len(prompts)) % self.settings.rollouts_per_prompt
        seed = stream_seed(self.settings.seed, "train", step)
        running = torch.ones(len(prompts), dtype=torch.bool)
        for position in range(self.settings.max_new_tokens):
            log_student = self.log_probs(self.student, ids, mask)[:, -1]
            log_policy = log_student
            if self.budget(step) > 0:
                log_teacher = self.log_probs(self.teacher, ids, mask)[:, -1]
                log_policy = blend(log_student, log_teacher, self.budget(step))
            u = uniforms(seed, keys, index, torch.full_like(index, position))
            token = torch.where(running, draw(log_student, log_policy, u), 0)
            ids = torch.cat([ids, token[:, None]], dim=1)
            mask = torch.cat([mask, running[:, None].long()], dim=1)
            running &= token != self.stops[0]
            if not running.any():
                break
        completion_mask = mask.clone()
        completion_mask[:, :longest] = 0
        return ids, mask, completion_mask.bool()

    def loss(self, ids, mask, completion_mask):
        """Reverse KL on the student's top-k, token mean over completions (stop token included)."""
        predicts = completion_mask[:, 1:]
        log_student = self.log_probs(self.student, ids, mask)[:, :-1][predicts]
        with torch.no_grad():
            log_teacher = self.log_probs(self.teacher, ids, mask)[:, :-1][predicts]
            support = log_student.topk(min(self.settings.top_k, self.rows)).indices
            weight = log_student.exp().gather(-1, support)
            weight = weight / weight.sum(-1, keepdim=True)
            ratio = (log_student - log_teacher).gather(-1, support)
            advantage = torch.where(weight > 0, weight * ratio, 0.0)
        # The gradient of the reverse KL on the support: Σ w (log p - log q) ∇ log p (paper, section 5).
        log_support = log_student.gather(-1, support)
        surrogate = torch.where(weight > 0, advantage * log_support, 0.0).sum(-1).mean()
        return surrogate, advantage.sum(-1).mean()

    def step(self, prompts, step):
        """One optimizer step on already repeated prompts; returns what happened."""
        self.student.eval()
        ids, mask, completion_mask = self.rollouts(prompts, step)
        surrogate, divergence = self.loss(ids, mask, completion_mask)
        self.optimizer.zero_grad()
        surrogate.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        completions = [row[chosen].tolist() for row, chosen in zip(ids, completion_mask, strict=True)]
        return {"budget": self.budget(step), "divergence": divergence.item(), "completions": completions}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=16, help="prompts per step")
    arguments = parser.parse_args()
    settings = Settings()
    student, tokenizer = zoo.load("student")
    teacher, _ = zoo.load("teacher")
    problems = zoo.problems(arguments.steps * arguments.prompts, seed=0, split="train")
    run = Distillation(student, teacher, settings)
    for step in range(arguments.steps):
        batch = problems[step * arguments.prompts : (step + 1) * arguments.prompts]
        prompts = [
            tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
            for row in batch
            for _ in range(settings.rollouts_per_prompt)
        ]
        seen = run.step(prompts, step)
        answers = [row["answer"] for row in batch for _ in range(settings.rollouts_per_prompt)]
        texts = tokenizer.batch_decode(seen["completions"], skip_special_tokens=True)
        reward = sum(f"\\boxed{{{a}}}" in text for a, text in zip(answers, texts, strict=True)) / len(texts)
        print(f"step {step:3d}  budget {seen['budget']:.3f}  divergence {seen['divergence']:.4f}  reward {reward:.2f}")


if __name__ == "__main__":
    main()
