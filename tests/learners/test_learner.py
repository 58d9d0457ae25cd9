"""Learner and its roles on real ranks, against one optimizer step of plain PyTorch, one sequence
at a time.
"""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from learners.checkpoints import load_causal_lm, load_critic, load_reward_model, read_calibration
from learners.experience import Experience
from learners.export import export_saved, save_config, save_weights
from learners.settings import (
    LearnerSettings,
    ModelSettings,
    OptimizerSettings,
    RewardModelSettings,
)
from learners.weights import read_saved
from tests.learners.ranks import Ranks

pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]

PAD = 39
SEED = 5
TOTAL_STEPS = 10
TEMPERATURE = 0.7
VALUE_CLIP = 0.2
CLIP_LOW = 0.2
CLIP_HIGH = 0.3
KL_BETA = 0.1
CENTRING = 0.05
ROLES = ("ppo", "grpo", "critic", "reward", "sft")
STAGES = (0, 1, 2, 3)
ONE_EACH = 1  # micro-batch budgets in tokens
UNEVEN = 40
PAIRS_UNEVEN = 80
WHOLE = 10_000
NAN = float("nan")
INF = float("inf")

# clips every step
SGD = OptimizerSettings(kind="sgd", learning_rate=0.1, max_grad_norm=0.2, warmup_steps=1)
# eps: where a gradient is exactly 0, AdamW would otherwise turn rounding errors into whole steps
ADAMW = OptimizerSettings(
    kind="adamw", learning_rate=3e-4, max_grad_norm=0, weight_decay=0.1, eps=1e-5, warmup_steps=1
)


# --- what runs on the ranks -----------------------------------------------------------------------


def learner(rank, role, settings):
    from learners.actor import ActorLearner
    from learners.algorithms.grpo import GRPO, GRPOSettings
    from learners.algorithms.ppo import PPO, PPOSettings
    from learners.critic import CriticLearner
    from learners.reward_model import RewardModelLearner
    from learners.sft import SFTLearner

    clips = {"clip_low": CLIP_LOW, "clip_high": CLIP_HIGH}
    match role:
        case "ppo":
            return ActorLearner(
                settings, PPO(PPOSettings(**clips)), TEMPERATURE, 32, TOTAL_STEPS, rank
            )
        case "grpo":
            grpo = GRPO(GRPOSettings(**clips, kl_beta=KL_BETA), 2)
            return ActorLearner(settings, grpo, TEMPERATURE, 32, TOTAL_STEPS, rank)
        case "critic":
            return CriticLearner(settings, VALUE_CLIP, TOTAL_STEPS, rank)
        case "reward":
            return RewardModelLearner(
                settings, RewardModelSettings(centring=CENTRING), PAD, SEED, TOTAL_STEPS, rank
            )
        case "sft":
            return SFTLearner(settings, TOTAL_STEPS, rank)


def share(rank, role, batch):
    return batch.select(batch.shard(rank.world_size, 2 if role == "reward" else 1)[rank.index])


def weights_of(engine):
    return torch.cat(
        [tensor.float().flatten() for _, tensors in engine.iter_groups() for tensor in tensors]
    )


def train(rank, role, settings, batch, steps=2):
    engine = learner(rank, role, settings)
    shard = share(rank, role, batch)
    return [engine.train(shard) for _ in range(steps)], weights_of(engine)


def train_and_look(rank, role, optimizers, settings, batch):
    """Per optimizer: metrics of two steps, the gradient each of them saw, and the weights after the
    second.
    """
    return [
        _train_and_look(rank, role, settings.model_copy(update={"optimizer": o}), batch)
        for o in optimizers
    ]


def _train_and_look(rank, role, settings, batch):
    from deepspeed.utils import safe_get_full_grad

    engine = learner(rank, role, settings)
    gradients = []
    step = engine._step

    def look_and_step():
        plain = settings.zero_stage == 0
        found = [p.grad if plain else safe_get_full_grad(p) for p in engine.model.parameters()]
        gradients.append(torch.cat([g.float().flatten() for g in found]))
        return step()

    engine._step = look_and_step
    shard = share(rank, role, batch)
    return [engine.train(shard) for _ in range(2)], gradients, weights_of(engine)


def train_without_boundaries(rank, role, settings, batch):
    """The trap: nobody tells DeepSpeed which micro-batch is the last one."""
    engine = learner(rank, role, settings)
    engine.engine.set_gradient_accumulation_boundary = lambda last: None
    shard = share(rank, role, batch)
    return [engine.train(shard) for _ in range(2)], weights_of(engine)


def infinite_gradient(loss, outputs, *rest):
    """The loss is finite and its gradient is not: d sqrt(x) / dx at 0."""
    value, stats = loss(outputs, *rest)
    return value + (outputs.sum() * 0.0).sqrt(), stats


def infinite_logprobs(loss, outputs, *rest):
    """Log-ratios are bounded: without a look at the log-probs loss and gradient would be finite."""
    return loss(outputs - INF, *rest)


def train_broken_first(rank, role, fault, settings, batch):
    """A step with a faulty loss on one rank alone, then two sound ones; and the weights before and
    after the first.
    """
    engine = learner(rank, role, settings)
    loss = engine.loss
    if rank.index == 0:
        engine.loss = partial(fault, loss)
    before = weights_of(engine)
    shard = share(rank, role, batch)
    refused = engine.train(shard)
    after = weights_of(engine)
    engine.loss = loss
    return (
        refused,
        torch.equal(before, after),
        [engine.train(shard) for _ in range(2)],
        weights_of(engine),
    )


def train_on_poison_first(rank, role, settings, poisoned, batch):
    """A step on a batch with one bad number, then two on a sound one; and the weights before and
    after the first.
    """
    engine = learner(rank, role, settings)
    before = weights_of(engine)
    refused = engine.train(share(rank, role, poisoned))
    after = weights_of(engine)
    shard = share(rank, role, batch)
    return (
        refused,
        torch.equal(before, after),
        [engine.train(shard) for _ in range(2)],
        weights_of(engine),
    )


def measure_then_train(rank, role, settings, batch):
    engine = learner(rank, role, settings)
    shard = share(rank, role, batch)
    return engine.evaluate(shard), engine.train(shard), weights_of(engine)


def train_from_own_logprobs(rank, settings, batch, rows):
    """Two steps on `rows` whose old log-probs this Actor has just read, in other micro-batches."""
    engine = learner(rank, "ppo", settings)
    indices = batch.shard(rank.world_size)[rank.index]
    shard = batch.select(indices)
    shard = replace(shard, old_logprobs=engine.infer(shard))
    mini_batch = shard.select([i for i, row in enumerate(indices) if row in rows])
    return [engine.train(mini_batch) for _ in range(2)]


def infer(rank, role, settings, batch):
    engine = learner(rank, role, settings)
    outputs = engine.infer(share(rank, role, batch))
    return outputs, engine.probe(batch.input_ids[0, :5].tolist()) if role == "ppo" else None


def save_and_continue(rank, settings, batch, folder, role="ppo"):
    engine = learner(rank, role, settings)
    shard = share(rank, role, batch)
    engine.train(shard)
    engine.save(folder)
    return [engine.train(shard) for _ in range(2)], weights_of(engine)


def load_and_continue(rank, settings, batch, folder, role="ppo"):
    engine = learner(rank, role, settings)
    shard = share(rank, role, batch)
    engine.load(folder)
    return [engine.train(shard) for _ in range(2)], weights_of(engine)


def load_elsewhere(rank, settings, folder):
    try:
        learner(rank, "ppo", settings).load(folder)
    except ValueError as error:
        return str(error)


def train_and_export(rank, role, settings, batch, folder):
    engine = learner(rank, role, settings)
    shard = share(rank, role, batch)
    engine.train(shard)
    if role == "reward":
        engine.calibrate(0.5, 2.0)
    engine.export(folder)
    return engine.infer(shard), [tuple(entry) for entry in engine.metadata()]


def train_save_and_export(rank, role, settings, batch, folder):
    engine = learner(rank, role, settings)
    engine.train(share(rank, role, batch))
    engine.save(f"{folder}/learner")
    engine.export_config(f"{folder}/model_files")
    engine.export(f"{folder}/model")
    return engine.disk_bytes()


def factors(rank, settings, steps, total_steps):
    from learners.schedules import schedule

    factor = schedule(settings, total_steps)
    return [factor(i) for i in range(steps)]


# --- the reference: plain PyTorch -----------------------------------------------------------------


class Reference(NamedTuple):
    weights: torch.Tensor
    gradients: list[torch.Tensor]
    losses: list[float]
    norms: list[float]


def load(role, settings):
    if role == "reward":
        torch.manual_seed(SEED)
        return load_reward_model(settings, PAD)
    return load_critic(settings) if role == "critic" else load_causal_lm(settings)


def sequences(batch):
    """(ids, prompt length) of every row, without padding."""
    return [
        (ids[: p + r], p)
        for ids, p, r in zip(
            batch.input_ids,
            batch.prompt_lengths.tolist(),
            batch.response_lengths.tolist(),
            strict=True,
        )
    ]


def plain_outputs(model, role, batch):
    """Per row: log-probs or values of its response tokens, or its score."""
    outputs = []
    for ids, prompt in sequences(batch):
        logits = model(ids[None]).logits[0]
        if role == "reward":
            outputs.append(logits[0])
        elif role == "critic":
            outputs.append(logits[prompt - 1 : -1, 0])
        else:
            logprobs = (
                logits[prompt - 1 : -1] / (1.0 if role == "sft" else TEMPERATURE)
            ).log_softmax(-1)
            outputs.append(logprobs.gather(1, ids[prompt:, None])[:, 0])
    return outputs


def plain_loss(model, role, batch):
    outputs = plain_outputs(model, role, batch)
    if role == "reward":
        chosen = torch.stack(outputs[::2])
        rejected = torch.stack(outputs[1::2])
        per_pair = (
            -F.logsigmoid(chosen - rejected - batch.margins[::2])
            + CENTRING * (chosen + rejected) ** 2
        )
        return per_pair.mean()

    per_sequence = []
    for i, output in enumerate(outputs):
        valid = batch.loss_mask[i].nonzero()[:, 0]
        new = output[valid]
        if role == "sft":
            loss = -new
        elif role == "critic":
            old = batch.values[i, valid]
            target = batch.returns[i, valid]
            clipped = old + (new - old).clamp(-VALUE_CLIP, VALUE_CLIP)
            loss = 0.5 * torch.maximum((new - target) ** 2, (clipped - target) ** 2)
        else:
            ratio = (new - batch.old_logprobs[i, valid]).exp()
            advantage = batch.advantages[i, valid]
            loss = -torch.minimum(
                ratio * advantage, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantage
            )
        if role == "grpo":
            difference = batch.ref_logprobs[i, valid] - new
            loss = loss + KL_BETA * (difference.exp() - difference - 1)
        if len(loss):
            per_sequence.append(loss)
    return (
        torch.stack([x.mean() for x in per_sequence]).mean()
        if role == "grpo"
        else torch.cat(per_sequence).mean()
    )


def plain_training(role, model_settings, optimizer_settings, batch, steps=2):
    model = load(role, model_settings).double()  # so that rounding is the learner's alone
    s = optimizer_settings
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": s.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    if s.kind == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=s.learning_rate)
    else:
        optimizer = torch.optim.AdamW(groups, lr=s.learning_rate, betas=s.betas, eps=s.eps)
    gradients = []
    losses = []
    norms = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = s.learning_rate * (0.5, 1.0)[step]  # one step of warm-up
        optimizer.zero_grad()
        loss = plain_loss(model, role, batch)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.max_grad_norm or float("inf"))
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    return Reference(
        torch.cat([p.detach().flatten() for p in model.parameters()]).float(),
        gradients,
        losses,
        norms,
    )


# --- fixtures -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are tiny: more threads would only fight with the ranks for cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ranks():
    """ranks[n] is a pool of n processes."""
    pools = {n: Ranks(n) for n in (1, 2)}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Folders of tiny models: a decoder with tied and with untied embeddings, and a reward model;
    a decoder of a family without heads in Transformers, with no row for PAD, and its reward model.
    """
    names = ("tied", "untied", "reward", "own", "own_reward")
    folders = {name: str(tmp_path_factory.mktemp(name)) for name in names}
    for name in ("tied", "untied"):
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            tie_word_embeddings=name == "tied",
            initializer_range=0.05,
            eos_token_id=2,
            pad_token_id=PAD,
        )
        Qwen3ForCausalLM(config).save_pretrained(folders[name])
    load("reward", ModelSettings(path=folders["tied"])).save_pretrained(folders["reward"])
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": PAD}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.05}
    GraniteForCausalLM(GraniteConfig(**sizes, **heads)).save_pretrained(folders["own"])
    model = load("reward", ModelSettings(path=folders["own"]))
    save_weights(model, dict(model.state_dict()), Path(folders["own_reward"]))
    save_config(model, Path(folders["own_reward"]))
    return folders


@pytest.fixture(scope="module")
def model_of(paths):
    """Where each role begins."""
    starts = {
        "ppo": "tied",
        "grpo": "untied",
        "critic": "reward",
        "reward": "untied",
        "sft": "untied",
    }
    return {role: ModelSettings(path=paths[name]) for role, name in starts.items()}


@pytest.fixture(scope="module")
def batches(model_of):
    """Seven samples of very different lengths, one without a response and one unscorable; or five
    pairs.
    """
    draw = torch.Generator().manual_seed(1)
    prompt_lengths = (2, 1, 7, 3, 4, 1, 12)
    response_lengths = (1, 17, 3, 9, 0, 26, 6)

    def ids(lengths):
        return [torch.randint(3, PAD, (n,), generator=draw).tolist() for n in lengths]

    samples = Experience.from_ids(ids(prompt_lengths), ids(response_lengths))
    behind = ~samples.loss_mask

    def noise(scale):
        return torch.randn(samples.loss_mask.shape, generator=draw) * scale

    filled = {}
    for role in ("ppo", "grpo", "critic", "sft"):
        with torch.no_grad():
            outputs = plain_outputs(load(role, model_of[role]), role, samples)
        now = torch.stack([F.pad(row, (0, behind.shape[1] - len(row))) for row in outputs])
        known = {
            "old_logprobs": now + noise(0.2),  # some ratios are clipped, some are not
            "ref_logprobs": now + noise(0.2),
            "values": now + noise(0.2),
            "advantages": noise(1.0),
            "returns": noise(1.0),
        }
        mask = ~behind & (torch.arange(7) != 2)[:, None]
        mask[1, 5:9] = mask[5, 20:] = False  # text the policy did not write
        # garbage that nobody may read
        known = {name: x.masked_fill(~mask, NAN) for name, x in known.items()}
        filled[role] = replace(samples, **known, loss_mask=mask)

    prompts = ids((2, 9, 1, 5, 4))
    answers = ids((1, 14, 20, 2, 3, 3, 11, 30, 6, 8))
    pairs = Experience.from_ids([prompts[i // 2] for i in range(10)], answers)
    filled["reward"] = replace(
        pairs, margins=torch.tensor([0.0, 0.5, 1.0, 0.2, 0.1]).repeat_interleave(2)
    )
    return filled


@pytest.fixture(scope="module")
def reference(model_of, batches):
    """reference(role, optimizer, rows) is the plain training, computed once."""
    seen = {}

    def training(role, optimizer, rows=None):
        key = role, optimizer.kind, rows
        if key not in seen:
            batch = batches[role] if rows is None else batches[role].select(rows)
            seen[key] = plain_training(role, model_of[role], optimizer, batch)
        return seen[key]

    return training


@pytest.fixture(scope="module")
def settings_of(model_of):
    def settings(role, stage, budget=UNEVEN, optimizer=SGD, path=None):
        model = model_of[role] if path is None else ModelSettings(path=path)
        return LearnerSettings(
            model=model, zero_stage=stage, micro_batch_tokens=budget, optimizer=optimizer
        )

    return settings


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def assert_trained_like(expected, results, optimizer):
    for metrics, weights in results:
        assert metrics == results[0][0], "metrics differ between ranks"
        close(weights, expected.weights)
    for i, step in enumerate(results[0][0]):
        assert step["loss"] == pytest.approx(expected.losses[i], abs=2e-6)
        assert step["grad_norm"] == pytest.approx(expected.norms[i], rel=1e-5, abs=1e-6)
        assert step["learning_rate"] == pytest.approx(optimizer.learning_rate * (0.5, 1.0)[i])


def in_order(outputs, batch, group=1):
    """The ranks' shards of outputs as one list, row by row of `batch`."""
    rows: dict[int, torch.Tensor] = {}
    for share, output in zip(batch.shard(len(outputs), group), outputs, strict=True):
        rows |= dict(zip(share, output, strict=True))
    return [rows[i] for i in range(len(batch))]


def assert_outputs(outputs, expected):
    for output, row in zip(outputs, expected, strict=True):
        close(output[: len(row)] if row.ndim else output, row, 2e-6)
        assert not row.ndim or not output[len(row) :].any()


# --- one loss, however it is cut ------------------------------------------------------------------


def budget_of(role, budget):
    """Pairs are twice as long: what cuts samples unevenly would put every pair by itself."""
    return PAIRS_UNEVEN if role == "reward" and budget == UNEVEN else budget


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("role", ROLES)
def test_the_three_budgets_cut_the_mini_batch_in_three_ways(batches, role, n):
    batch = batches[role]
    group = 2 if role == "reward" else 1

    def sizes(budget):
        """Samples (or pairs) of every micro-batch, rank by rank."""
        shards = [batch.select(rows) for rows in batch.shard(n, group)]
        cuts = [shard.micro_batches(budget_of(role, budget), group) for shard in shards]
        return [[len(rows) // group for rows in cut] for cut in cuts]

    assert all(set(cut) == {1} and len(cut) > 1 for cut in sizes(ONE_EACH))
    assert any(len(set(cut)) > 1 for cut in sizes(UNEVEN))
    assert all(len(cut) == 1 for cut in sizes(WHOLE))


@pytest.mark.parametrize("budget", [ONE_EACH, UNEVEN, WHOLE], ids=["one_each", "uneven", "whole"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("role", ROLES)
def test_every_cut_of_every_role_steps_like_plain_pytorch(
    ranks, reference, settings_of, batches, role, n, stage, budget
):
    """Seven samples (or five pairs) on one rank or two: gradients, and weights after two steps of
    SGD and of AdamW.
    """
    settings = settings_of(role, stage, budget_of(role, budget))
    results = ranks[n].run(train_and_look, role, (SGD, ADAMW), settings, batches[role])
    for i, optimizer in enumerate((SGD, ADAMW)):
        expected = reference(role, optimizer)
        seen = [of_rank[i] for of_rank in results]
        assert_trained_like(
            expected, [(metrics, weights) for metrics, _, weights in seen], optimizer
        )
        for _, gradients, _ in seen:
            for gradient, plain in zip(gradients, expected.gradients, strict=True):
                assert (gradient - plain).abs().max() <= 1e-6 * plain.abs().max()


@pytest.mark.parametrize("stage", STAGES)
def test_recomputed_activations_change_nothing(ranks, reference, settings_of, batches, stage):
    settings = settings_of("ppo", stage)
    model = settings.model.model_copy(update={"gradient_checkpointing": True})
    results = ranks[2].run(
        train, "ppo", settings.model_copy(update={"model": model}), batches["ppo"]
    )
    assert_trained_like(reference("ppo", SGD), results, SGD)


@pytest.mark.parametrize(("role", "rows"), [("ppo", (5,)), ("reward", (2, 3))])
@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_without_rows_takes_part(ranks, reference, settings_of, batches, stage, role, rows):
    batch = batches[role].select(rows)
    results = ranks[2].run(train, role, settings_of(role, stage), batch)
    assert_trained_like(reference(role, SGD, rows), results, SGD)


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_1_and_2_accumulate_every_micro_batch(ranks, reference, settings_of, batches, stage):
    """Without an explicit accumulation boundary these two stages keep only the last micro-batch's
    gradient.
    """
    expected = reference("sft", SGD)
    last = reference("sft", SGD, (0,))
    assert (last.weights - expected.weights).abs().max() > 1e-3, "the trap would not show"
    arguments = ("sft", settings_of("sft", stage, ONE_EACH), batches["sft"])
    assert_trained_like(expected, ranks[1].run(train, *arguments), SGD)
    ((_, lost),) = ranks[1].run(train_without_boundaries, *arguments)
    assert (lost - expected.weights).abs().max() > 1e-3


@pytest.mark.parametrize("row", [2, 4], ids=["unscorable", "empty"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_mini_batch_with_nothing_valid_moves_nothing(ranks, settings_of, batches, stage, row):
    batch = batches["ppo"].select([row])
    for metrics, weights in ranks[2].run(train, "ppo", settings_of("ppo", stage), batch):
        assert [step["grad_norm"] for step in metrics] == [0, 0] and [
            step["loss"] for step in metrics
        ] == [0, 0]
        assert not any(step["skipped_updates"] for step in metrics)
        start = load("ppo", settings_of("ppo", stage).model)
        assert torch.equal(weights, torch.cat([p.detach().flatten() for p in start.parameters()]))


@pytest.mark.parametrize("stage", [2, 3])
def test_measuring_leaves_no_trace(ranks, settings_of, batches, stage):
    settings = settings_of("sft", stage)
    batch = batches["sft"]
    plain = ranks[2].run(train, "sft", settings, batch, 1)
    for (metrics, weights), (measured, learned, after) in zip(
        plain, ranks[2].run(measure_then_train, "sft", settings, batch), strict=True
    ):
        assert (
            measured["loss"] == pytest.approx(metrics[0]["loss"], abs=1e-6)
            and "grad_norm" not in measured
        )
        assert learned == pytest.approx(metrics[0], abs=1e-6)
        close(after, weights, 1e-7)


# --- numbers that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "field", "value"), [("ppo", "advantages", NAN), ("critic", "returns", 1e30)]
)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("n", [1, 2])
def test_an_update_that_is_not_finite_is_skipped_and_leaves_no_trace(
    ranks, reference, settings_of, batches, n, stage, role, field, value
):
    """One bad token of one rank. The Critic's squared error overflows: its loss is infinite, its
    gradient is not.
    """
    batch = batches[role]
    bad = getattr(batch, field).clone()
    bad[1, 4] = value
    settings = settings_of(role, stage, optimizer=ADAMW)
    results = ranks[n].run(
        train_on_poison_first, role, settings, replace(batch, **{field: bad}), batch
    )
    for refused, unchanged, _, _ in results:
        assert refused["skipped_updates"] == 1 and unchanged
        assert not math.isfinite(refused["loss"]) and not math.isfinite(refused["grad_norm"])
    assert all(step["skipped_updates"] == 0 for _, _, metrics, _ in results for step in metrics)
    assert_trained_like(
        reference(role, ADAMW), [(metrics, weights) for _, _, metrics, weights in results], ADAMW
    )


@pytest.mark.parametrize(
    ("role", "fault"), [("sft", infinite_gradient), ("ppo", infinite_logprobs)]
)
@pytest.mark.parametrize("stage", STAGES)
def test_what_only_one_rank_sees_of_an_infinity_makes_all_skip(
    ranks, reference, settings_of, batches, stage, role, fault
):
    settings = settings_of(role, stage, optimizer=ADAMW)
    results = ranks[2].run(train_broken_first, role, fault, settings, batches[role])
    for refused, unchanged, _, _ in results:
        assert refused["skipped_updates"] == 1 and unchanged
        assert math.isfinite(refused["loss"]) == (fault is infinite_gradient)
    assert_trained_like(
        reference(role, ADAMW), [(metrics, weights) for _, _, metrics, weights in results], ADAMW
    )


# --- bfloat16 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [None, "float32"])
@pytest.mark.parametrize("stage", STAGES[1:])
def test_bfloat16_learns_as_float32_does(ranks, settings_of, batches, stage, head):
    """Twenty steps, one sample per micro-batch: without float32 master weights and sums the loss
    falls behind.
    """
    optimizer = ADAMW.model_copy(update={"warmup_steps": 0})
    plain = settings_of("sft", stage, ONE_EACH, optimizer)
    bfloat16 = {"dtype": "bfloat16", "head_dtype": head}
    narrow = plain.model_copy(update={"model": plain.model.model_copy(update=bfloat16)})
    (expected, _), (metrics, _) = (
        ranks[2].run(train, "sft", s, batches["sft"], 20)[0] for s in (plain, narrow)
    )
    assert expected[0]["loss"] - expected[-1]["loss"] > 0.3
    assert metrics[-1]["loss"] == pytest.approx(expected[-1]["loss"], abs=5e-3)
    assert metrics[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=5e-3)


# --- the first mini-batch -------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "stage"), [(1, 0), (2, 2), (2, 3)])
def test_the_first_ratio_is_one_and_later_ones_drift(ranks, settings_of, batches, n, stage):
    batch = batches["ppo"]
    rows = [0, 1, 3, 6]
    first, second = ranks[n].run(train_from_own_logprobs, settings_of("ppo", stage), batch, rows)[0]
    assert first["max_ratio_deviation"] <= 1e-6 and first["ratio"] == pytest.approx(1, abs=1e-6)
    assert first["clip_fraction"] == 0 and first["grad_norm"] > 0.01
    assert second["max_ratio_deviation"] > 1e-3 and second["approx_kl"] > 0


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "n", "stage", "budget"),
    [
        ("ppo", 1, 0, ONE_EACH),
        ("ppo", 1, 3, UNEVEN),
        ("ppo", 1, 2, WHOLE),
        ("ppo", 2, 3, UNEVEN),
        ("critic", 2, 2, UNEVEN),
        ("reward", 2, 3, ONE_EACH),
    ],
)
def test_rows_come_back_in_order(ranks, settings_of, batches, model_of, role, n, stage, budget):
    batch = batches[role]
    model = load(role, model_of[role])
    with torch.no_grad():
        expected = plain_outputs(model, role, batch)
        if role != "reward":
            expected = [
                torch.where(batch.loss_mask[i, : len(x)], x, 0.0) for i, x in enumerate(expected)
            ]
    results = ranks[n].run(infer, role, settings_of(role, stage, budget), batch)
    outputs = [output for output, _ in results]
    assert all(not output.requires_grad and output.dtype == torch.float32 for output in outputs)
    assert_outputs(in_order(outputs, batch, 2 if role == "reward" else 1), expected)
    if role == "ppo":  # the probe reads at temperature 1, every rank the same
        ids = batch.input_ids[:1, :5]
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        for _, probe in results:
            close(torch.tensor(probe), logprobs, 2e-6)


def test_a_rank_without_rows_reads_nothing(ranks, settings_of, batches):
    batch = batches["ppo"].select([5])
    (first, _), (second, _) = ranks[2].run(infer, "ppo", settings_of("ppo", 3), batch)
    assert first.shape == (1, 26) and second.numel() == 0


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "stage"), [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_a_loaded_engine_continues_bit_by_bit(ranks, settings_of, batches, tmp_path, n, stage):
    settings = settings_of("ppo", stage, optimizer=ADAMW)
    saved = ranks[n].run(save_and_continue, settings, batches["ppo"], str(tmp_path))
    loaded = ranks[n].run(load_and_continue, settings, batches["ppo"], str(tmp_path))
    for (metrics, weights), (metrics_again, weights_again) in zip(saved, loaded, strict=True):
        assert metrics_again == metrics and metrics[0]["learning_rate"] == ADAMW.learning_rate
        assert torch.equal(weights_again, weights)


@pytest.mark.parametrize("stage", [2])
def test_a_loaded_engine_steps_as_its_recipe_says_now(ranks, settings_of, batches, tmp_path, stage):
    """The optimizer's saved groups brought the old rate and decay back, whatever was accepted."""
    settings = settings_of("ppo", stage, optimizer=ADAMW)
    ranks[1].run(save_and_continue, settings, batches["ppo"], str(tmp_path))
    weights = {}
    for decay in (0.0, 0.9):
        now = ADAMW.model_copy(update={"learning_rate": 1e-2, "weight_decay": decay})
        settings = settings_of("ppo", stage, optimizer=now)
        ((metrics, weights[decay]),) = ranks[1].run(
            load_and_continue, settings, batches["ppo"], str(tmp_path)
        )
        assert [step["learning_rate"] for step in metrics] == [1e-2] * 2
    assert not torch.equal(weights[0.0], weights[0.9])


def test_another_layout_is_refused_in_one_line(ranks, settings_of, batches, tmp_path):
    folder = str(tmp_path)
    ranks[2].run(save_and_continue, settings_of("ppo", 2), batches["ppo"], folder)
    for n, stage in ((2, 3), (1, 2)):
        for message in ranks[n].run(load_elsewhere, settings_of("ppo", stage), folder):
            assert folder in message and "same layout" in message and "\n" not in message


# --- export ---------------------------------------------------------------------------------------

AUTO = {
    "ppo": AutoModelForCausalLM,
    "critic": AutoModelForTokenClassification,
    "reward": AutoModelForSequenceClassification,
}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    ("role", "start"),
    [("ppo", "tied"), ("ppo", "untied"), ("critic", "reward"), ("reward", "untied")],
)
def test_an_export_loads_in_plain_transformers(
    ranks, paths, settings_of, batches, tmp_path, role, start, stage
):
    batch = batches[role]
    folder = str(tmp_path / "model")
    settings = settings_of(role, stage, path=paths[start])
    results = ranks[2].run(train_and_export, role, settings, batch, folder)

    model, info = AUTO[role].from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert [entry[0] for entry in results[0][1]] == [name for name, _ in model.named_parameters()]
    assert all(shape == model.get_parameter(name).shape for name, _, shape in results[0][1])
    with torch.no_grad():
        expected = plain_outputs(model, role, batch)
    if role == "reward":
        assert read_calibration(model.config) == (0.5, 2.0) and model.config.pad_token_id == PAD
    else:
        expected = [
            torch.where(batch.loss_mask[i, : len(x)], x, 0.0) for i, x in enumerate(expected)
        ]
    outputs = [output for output, _ in results]
    assert_outputs(in_order(outputs, batch, 2 if role == "reward" else 1), expected)


@pytest.mark.parametrize(
    ("role", "start", "stage", "dtype"),
    [
        *(("ppo", "tied", stage, "float32") for stage in STAGES),
        *(("sft", "untied", stage, "bfloat16") for stage in STAGES[1:]),
        ("ppo", "tied", 3, "bfloat16"),
        ("ppo", "tied", 3, "bfloat16, float32 head"),
        ("reward", "untied", 2, "float32"),
        ("reward", "untied", 3, "float32"),
        ("reward", "own", 3, "float32"),
    ],
)
def test_a_checkpoint_becomes_the_model_that_the_run_exports(
    ranks, paths, settings_of, batches, tmp_path, role, start, stage, dtype
):
    """From the files alone, to the byte; and both take no less room than was foretold."""
    plain = settings_of(role, stage, path=paths[start], optimizer=ADAMW)
    dtype, _, head = dtype.partition(", ")
    changes = {"dtype": dtype, "head_dtype": "float32" if head else None}
    settings = plain.model_copy(update={"model": plain.model.model_copy(update=changes)})
    arguments = (role, settings, batches[role], str(tmp_path))
    (foretold, *others) = ranks[2].run(train_save_and_export, *arguments)
    assert others == [foretold]

    export_saved(read_saved(tmp_path / "learner"), tmp_path / "model_files", tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    taken = [(tmp_path / "model" / "model.safetensors").stat().st_size]
    taken.append(sum(file.stat().st_size for file in (tmp_path / "learner").rglob("*.pt")))
    for least, size in zip(foretold, taken, strict=True):
        assert 0.5 * size < least <= size


@pytest.mark.parametrize(
    ("role", "start", "stage"),
    [("reward", "own", 2), ("reward", "own", 3), ("critic", "own_reward", 3)],
)
def test_a_head_of_our_own_is_trained_as_any(
    ranks, paths, settings_of, batches, tmp_path, role, start, stage
):
    """The embedding, too, that grew by a row for PAD; and it goes on from its checkpoint."""
    settings = settings_of(role, stage, path=paths[start])
    expected = plain_training(role, settings.model, SGD, batches[role])
    assert_trained_like(expected, ranks[2].run(train, role, settings, batches[role]), SGD)
    arguments = (settings, batches[role], str(tmp_path), role)
    saved = ranks[2].run(save_and_continue, *arguments)
    loaded = ranks[2].run(load_and_continue, *arguments)
    for (metrics, weights), (again, same) in zip(saved, loaded, strict=True):
        assert metrics == again and torch.equal(weights, same)


# --- the learning rate ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 0.8, 0.6, 0.4, 0.2, 0.2]),
        (
            "cosine",
            [
                0.25,
                0.5,
                0.75,
                1,
                0.2 + 0.4 * (1 + 2**-0.5),
                0.6,
                0.2 + 0.4 * (1 - 2**-0.5),
                0.2,
                0.2,
            ],
        ),
    ],
)
def test_the_schedule_warms_up_and_decays_to_its_end(ranks, kind, expected):
    settings = OptimizerSettings(warmup_steps=3, schedule=kind, final_fraction=0.2)
    (result,) = ranks[1].run(factors, settings, 9, 7)
    assert result == pytest.approx(expected)


def test_a_schedule_without_steps_to_decay_in_stays_finite(ranks):
    settings = OptimizerSettings(warmup_steps=3, schedule="cosine")
    (result,) = ranks[1].run(factors, settings, 4, 2)
    assert result == pytest.approx([0.25, 0.5, 0.75, 1])
