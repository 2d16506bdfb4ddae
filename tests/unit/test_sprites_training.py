import random
from dataclasses import replace

import pytest
import torch

from causvid_adapter import CausalWan
from nasa_video.sprites.captions import is_held_out
from nasa_video.sprites.detectors import HEADS, Detector, DetectorNetwork, shows, targets, truth
from nasa_video.sprites.vocabulary import nearest_known, unknown_words
from nasa_video.sprites.world import ATTRIBUTES, FLAWS, MOTIONS, sample_scenes, sample_switches
from nasa_video.text import WordLlamaEncoder
from nasa_video.training.attention import matrix_attention
from nasa_video.training.checkpoint import load_state, save_state
from nasa_video.training.dataset import LatentClips
from nasa_video.training.distill import Distillation, DistillDraws, DistillTraining, matching_direction, rollout
from nasa_video.training.flow import FlowDraws, FlowTraining, draw_noise_levels, flow_loss, new_transformer, train_flow
from nasa_video.training.journal import Journal
from nasa_video.training.latent_detector import LatentDetector, legible, spread_loss, stated_loss
from nasa_video.training.optimiser import orthogonalise, warm_then_linear
from nasa_video.training.parallel import Team, made_ahead
from nasa_video.training.plan import load_plan

TINY = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


@pytest.fixture
def tiny() -> CausalWan:
    torch.manual_seed(0)
    model = new_transformer(TINY, torch.device("cpu"))
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.1)
    return model


def test_matrix_attention_is_softmax_attention():
    q, k, v = (torch.randn(2, n, 3, 8) for n in (6, 9, 9))
    mask = torch.rand(6, 9) > 0.3
    mask[:, 0] = True
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    torch.testing.assert_close(matrix_attention(q, k, v, mask), expected.transpose(1, 2))


def test_the_training_attention_computes_what_the_shipped_one_does(tiny):
    x, context = torch.randn(1, 3, 4, 4, 4), torch.randn(1, 5, 8)
    ours = tiny(x, 500.0, context)
    from diffusers import WanTransformer3DModel

    plain = WanTransformer3DModel(**TINY)
    plain.load_state_dict(tiny.transformer.state_dict())
    torch.testing.assert_close(CausalWan(plain)(x, 500.0, context), ours, atol=1e-5, rtol=1e-4)


def test_a_rollout_passes_no_gradient_from_a_chunk_to_an_earlier_one(tiny):
    noise, context = torch.randn(1, 4, 4, 4, 4, requires_grad=True), torch.randn(1, 5, 8)
    clip = rollout(tiny, context, noise, (1000.0,), 0, 2, torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(clip[:, 2:].square().sum(), noise)
    assert gradient[:, 2:].abs().max() > 0
    assert gradient[:, :2].abs().max() == 0


def test_a_fake_score_that_equals_the_teacher_gives_no_direction(tiny):
    clip, context = torch.randn(2, 4, 4, 4, 4), torch.randn(2, 5, 8)
    sigma, noise = torch.tensor([0.3, 0.8]), torch.randn(2, 4, 4, 4, 4)
    direction = matching_direction(tiny, tiny, clip, context, torch.zeros_like(context), 1.0, sigma, noise)
    assert direction.abs().max() == 0


@pytest.mark.parametrize("bidirectional", [True, False])
def test_noise_levels(bidirectional):
    settings = FlowTraining()
    for seed in range(10):
        levels = draw_noise_levels(settings, 8, 9, bidirectional, torch.Generator().manual_seed(seed))
        assert levels.frames_per_chunk == (None if bidirectional else 3)
        chunked = levels.sigma.unflatten(1, (3, 3))
        assert (chunked == chunked[..., :1]).all()
        if bidirectional:
            assert (levels.sigma == levels.sigma[:, :1]).all()
        assert (levels.counted == (levels.sigma > 0).float()).all()
        assert levels.counted.unflatten(1, (3, 3))[:, -1].all()


def test_a_text_a_chunk_is_one_text_where_all_are_the_same(tiny):
    x, context = torch.randn(2, 6, 4, 4, 4), torch.randn(2, 5, 8)
    one = tiny(x, 500.0, context, frames_per_chunk=2)
    torch.testing.assert_close(tiny(x, 500.0, context.repeat_interleave(3, 0), frames_per_chunk=2), one)


def test_the_text_of_a_chunk_acts_from_there_on(tiny):
    x, context = torch.randn(1, 6, 4, 4, 4), torch.randn(3, 5, 8)
    other = context.clone()
    other[1] += 1
    change = tiny(x, 500.0, other, frames_per_chunk=2) - tiny(x, 500.0, context, frames_per_chunk=2)
    assert change[:, :2].abs().max() == 0
    assert change[:, 2:4].abs().amax() > 0
    assert change[:, 4:].abs().amax() > 0


def test_a_rollout_takes_a_text_a_chunk(tiny):
    noise, context = torch.randn(1, 4, 4, 4, 4), torch.randn(2, 5, 8)
    generators = [torch.Generator().manual_seed(0) for _ in range(3)]
    both = rollout(tiny, context, noise, (1000.0,), 0, 2, generators[0])
    first = rollout(tiny, context[:1], noise, (1000.0,), 0, 2, generators[1])
    torch.testing.assert_close(both[:, :2], first[:, :2])
    assert (both[:, 2:] - first[:, 2:]).abs().max() > 0


def clips_that_switch() -> LatentClips:
    scenes = sample_scenes(200, torch.Generator().manual_seed(1))
    later, chunk = sample_switches(scenes, 0.5, torch.Generator().manual_seed(2))
    return LatentClips(torch.zeros(200, 9, 4, 2, 2), torch.zeros(200, 9, 1, 2, 2), scenes, later, chunk)


def test_batches_are_of_one_kind():
    clips = clips_that_switch()
    assert len(clips.draw(8, 0).captions) == 8
    draw = clips.draw(8, 0, switching=True)
    assert len(draw.captions) == 24
    for i in range(0, 24, 3):
        assert draw.captions[i] != draw.captions[i + 2]
    emptied = draw.with_some_empty(0.5, random.Random(0)).captions
    kept = [set(map(bool, emptied[i : i + 3])) for i in range(0, 24, 3)]
    assert {frozenset(k) for k in kept} == {frozenset({True}), frozenset({False})}


def first_chunks() -> LatentClips:
    scenes = sample_scenes(40, torch.Generator().manual_seed(4))
    never = torch.zeros(40, dtype=torch.long)
    return LatentClips(torch.randn(40, 3, 4, 4, 4), torch.ones(40, 3, 1, 4, 4), scenes, scenes, never)


def whole_clips() -> LatentClips:
    scenes = sample_scenes(40, torch.Generator().manual_seed(5))
    later, chunk = sample_switches(scenes, 0.5, torch.Generator().manual_seed(6))
    return LatentClips(torch.randn(40, 9, 4, 4, 4), torch.ones(40, 9, 1, 4, 4), scenes, later, chunk)


@pytest.mark.parametrize("short_share", [0.0, 1.0])
def test_a_share_of_the_batches_holds_first_chunks_alone(tmp_path, monkeypatch, short_share):
    shapes, weights = [], []

    def record(model, batch, context, noise, levels, settings, sprite_weight):
        shapes.append((tuple(batch.latents.shape[:2]), levels.frames_per_chunk))
        weights.append(sprite_weight)
        return flow_loss(model, batch, context, noise, levels, settings, sprite_weight)

    monkeypatch.setattr("nasa_video.training.flow.flow_loss", record)
    monkeypatch.setattr("nasa_video.training.flow.compile_blocks", lambda model: None)
    model = TINY | {"text_dim": 256}
    settings = FlowTraining(model=model, iterations=4, batch_size=2, short_share=short_share, bidirectional_share=0.0)
    journal = Journal(tmp_path, "base", None)
    args = (tmp_path, 0, torch.device("cpu"), journal, Team())
    train_flow(settings, whole_clips(), first_chunks(), WordLlamaEncoder(8), *args)
    assert shapes == [((6, 3), None)] * 4 if short_share else [((2, 9), 3)] * 4
    assert weights[:2] == [settings.sprite_weight] * 2
    assert weights[2] > weights[3] == 0


def test_a_small_sprite_counts_as_much_as_a_big_one():
    """The same error everywhere in one clip or in another: the loss does not say which."""
    clips = whole_clips()
    clips.coverage[:] = 0
    clips.coverage[::2, :, :, :3, :3] = 1
    clips.coverage[1::2, :, :, :1, :1] = 1
    batch = replace(
        clips.take(clips.draw(2, 0)), latents=torch.zeros(2, 9, 4, 4, 4), coverage=clips.coverage[:2].clone()
    )
    levels = draw_noise_levels(FlowTraining(), 2, 9, True, torch.Generator().manual_seed(0))

    def loss(wrong: int) -> float:
        def model(noisy, timestep, context, frames_per_chunk):
            return (torch.arange(2) == wrong).float()[:, None, None, None, None].expand_as(noisy)

        noise = torch.zeros_like(batch.latents)
        return float(flow_loss(model, batch, torch.zeros(2, 1, 8), noise, levels, FlowTraining(), 8.0))

    assert loss(0) == pytest.approx(loss(1))
    assert loss(0) == pytest.approx(0.5)


def test_a_first_chunk_alone_is_the_start_of_a_causal_clip(tiny):
    x, context = torch.randn(2, 6, 4, 4, 4), torch.randn(2, 5, 8)
    whole = tiny(x, torch.full((2, 6), 700.0), context, frames_per_chunk=3)
    torch.testing.assert_close(tiny(x[:, :3], torch.full((2,), 700.0), context), whole[:, :3], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("short_share", "clips"), [(0.0, 2), (1.0, 6)])
def test_the_student_rolls_out_first_chunks_alone_at_times(tiny, monkeypatch, short_share, clips):
    rolled = []

    def record(student, context, noise, *args):
        rolled.append(noise.shape[:2])
        return rollout(student, context, noise, *args)

    monkeypatch.setattr("nasa_video.training.distill.rollout", record)
    monkeypatch.setattr("nasa_video.training.distill.compile_blocks", lambda model: None)
    steps = {1: (1000.0,)}
    settings = DistillTraining(
        steps=steps, step_counts=(1,), batch_size=2, short_share=short_share, bare_share=0.0, fake_warmup=0
    )
    encoder = WordLlamaEncoder(8)
    model = new_transformer(TINY | {"text_dim": 256}, torch.device("cpu"))
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.1)
    game = Distillation(settings, model, whole_clips(), first_chunks(), encoder, 0, Team())
    before = game.student.transformer.proj_out.weight.detach().clone()
    game.iterate(1, game.draws[1])
    assert rolled == [(clips, 3 if short_share else 9)]
    assert (game.student.transformer.proj_out.weight - before).abs().max() > 0


def test_the_spread_is_told_to_all_clips_together():
    """Shares like the data's cost least, whichever clips they fall on; stated attributes do not count."""
    scenes = sample_scenes(64, torch.Generator().manual_seed(0))
    never: list[frozenset[str]] = [frozenset()] * 64
    right = {n: torch.zeros(64, size) for n, size in HEADS.items()}
    for name, value in truth_logits(scenes).items():
        right[name] = 20 * value
    shifted_on = {n: v.roll(1, 0) for n, v in right.items()}
    favourite = dict(right, size=20 * torch.tensor([0.0, 1.0]).expand(64, 2))
    least = spread_loss(right, scenes, never)
    torch.testing.assert_close(spread_loss(shifted_on, scenes, never), least)
    assert spread_loss(favourite, scenes, never) > least + 5
    told = [frozenset({"size"})] * 64
    torch.testing.assert_close(spread_loss(favourite, scenes, told), spread_loss(right, scenes, told))


def test_what_no_clip_shows_is_still_asked_for():
    """Every clip is sure to be big, by far: the spread still wants some of them small, and the nearest most."""
    scenes = sample_scenes(64, torch.Generator().manual_seed(0))
    logits = {n: 20 * value for n, value in truth_logits(scenes).items()}
    distance = torch.linspace(20, 60, 64)
    logits["size"] = torch.stack((-distance, torch.zeros(64)), 1).requires_grad_(True)
    spread_loss(logits, scenes, [frozenset()] * 64).backward()
    towards_small = -logits["size"].grad[:, 0]
    assert towards_small[0] > 5
    assert towards_small.argmax() == 0
    logits["size"].grad = None
    spread_loss(logits, scenes, [frozenset({"size"})] * 64).backward()
    assert logits["size"].grad.abs().max() == 0


def truth_logits(scenes) -> dict[str, torch.Tensor]:
    """What a detector that is always right would say, +1 and -1."""
    answers = {}
    for name, value in targets(scenes).items():
        row = value if value.dtype.is_floating_point else torch.nn.functional.one_hot(value, HEADS[name]).float()
        answers[name] = 2 * row - 1
    return answers


def test_easy_clips_show_one_plain_sprite():
    clips = clips_that_switch()
    for name in ("count", "texture", "weather", *FLAWS):
        assert getattr(clips.take(clips.draw(64, 0, easy=1.0)).scenes, name).max() == 0
    for share in (0.0, 0.5):
        assert clips.take(clips.draw(64, 0, easy=share)).scenes.texture.max() > 0


def test_hard_clips_are_told_in_full():
    clips = clips_that_switch()
    draw = clips.draw(64, 0, hard=1.0)
    scenes = clips.take(draw).scenes
    spinning = MOTIONS.index("spinning")
    assert all(two or motion == spinning for two, motion in zip(scenes.count, scenes.motion, strict=True))
    assert scenes.count.float().mean() > 0.25
    assert all(stated >= {"shape", "colour", "size", "count", "motion", "background"} for stated in draw.stated)
    assert not any(map(is_held_out, draw.captions))
    some = clips.draw(64, 0, hard=0.5)
    assert 16 < sum(len(stated) >= 6 for stated in some.stated) < 56
    assert clips.draw(8, 3).captions == clips.draw(8, 3, hard=0.0).captions


def test_a_bare_batch_states_one_thing_that_all_its_clips_show():
    clips = clips_that_switch()
    seen = set()
    for seed in range(40):
        draw = clips.draw_bare(16, seed)
        scenes = clips.take(draw).scenes
        (stated,) = set(draw.stated)
        (attribute,) = stated
        seen.add(attribute)
        assert len(set(getattr(scenes, attribute).tolist())) == 1
        assert len(set(scenes.background.tolist())) > 1 or attribute == "background"
        assert not any(map(is_held_out, draw.captions))
    assert "shape" in seen
    assert len(seen) > 4


@pytest.mark.parametrize(("share", "alike"), [(0.0, False), (1.0, True)])
def test_a_share_of_the_iterations_is_told_one_thing(share, alike):
    settings = DistillTraining(
        steps={1: (1000.0,)}, step_counts=(1,), batch_size=4, bare_share=share, hard_share=0.0, empty_share=0.0
    )
    draws = DistillDraws(whole_clips(), first_chunks(), WordLlamaEncoder(8), 0, Team(), settings)
    told = [draws[step].draw.stated for step in range(4)]
    assert [len(set(stated)) == 1 and len(stated[0]) == 1 for stated in told] == [alike] * 4


def test_orthogonalised_updates_have_singular_values_near_one():
    stack = torch.randn(3, 20, 50)
    values = torch.linalg.svdvals(orthogonalise(stack[0]).float())
    assert values.min() > 0.4
    assert values.max() < 1.4
    torch.testing.assert_close(orthogonalise(stack)[0], orthogonalise(stack[0]), atol=0.02, rtol=0.1)


def test_the_draws_of_a_step_are_the_same_made_ahead_or_not():
    settings = FlowTraining(batch_size=2, iterations=6)
    draws = FlowDraws(whole_clips(), first_chunks(), WordLlamaEncoder(8), 0, Team(), settings)
    here = list(made_ahead(draws, range(2, 6), torch.device("cpu")))
    elsewhere = list(made_ahead(draws, range(2, 6), torch.device("cuda")))
    assert [d.draw for d in here] == [d.draw for d in elsewhere]
    assert len({tuple(d.draw.index) for d in here}) > 1
    for one, other in zip(here, elsewhere, strict=True):
        assert (one.embeds == other.embeds).all()


def test_the_learning_rate_rises_stays_and_falls():
    rates = [warm_then_linear(p) for p in (0.01, 0.2, 0.7, 1.0)]
    assert rates[1] == 1.0
    assert rates[0] < 1 > rates[2] > rates[3] > 0


def test_checkpoints_come_back(tmp_path):
    path = tmp_path / "state.pt"
    assert load_state(path) is None
    save_state(path, {"step": 3, "x": torch.ones(2)})
    state = load_state(path)
    assert state is not None
    assert state["step"] == 3
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("preset", ["sprites", "sprites-gpu"])
def test_presets_are_complete(preset, repository):
    plan = load_plan(repository / "configs" / "train" / f"{preset}.yaml")
    assert plan.base.model["in_channels"] == plan.latent_size[0]
    assert set(plan.student.step_counts) <= set(plan.student.steps)


def test_an_unknown_setting_is_refused(tmp_path, repository):
    text = (repository / "configs" / "train" / "sprites.yaml").read_text()
    path = tmp_path / "plan.yaml"
    path.write_text(text.replace("kl_weight", "kl_wait"))
    with pytest.raises(ValueError, match="kl_wait"):
        load_plan(path)


@pytest.fixture
def repository(request):
    return request.config.rootpath


def test_the_truth_has_a_label_for_every_attribute():
    scenes = sample_scenes(40, torch.Generator().manual_seed(0))
    labels = truth(scenes)
    assert set(labels) == set(ATTRIBUTES)
    for index in range(40):
        row = scenes.row(index)
        assert shows(labels["colour"][index], ATTRIBUTES["colour"][row["colour"]])
        assert labels["motion"][index] == ATTRIBUTES["motion"][row["motion"]]
    empty = truth(scenes.replace(count=-1))
    assert set(empty["shape"]) == {"none"}


def test_the_detector_comes_back_from_a_file(tmp_path):
    detector = Detector(DetectorNetwork())
    frames = torch.rand(2, 33, 3, 64, 64)
    detector.save(tmp_path / "detector.safetensors")
    again = Detector.load(tmp_path / "detector.safetensors")
    assert set(again.detect(frames)) == set(ATTRIBUTES)


def test_words_outside_the_world_are_found():
    encoder = WordLlamaEncoder(8)
    assert unknown_words("A small red star, bouncing on a dark background!", encoder) == []
    assert unknown_words("crimson stars and a sphere that jumps", encoder) == []
    assert unknown_words("an elephant playing piano", encoder) == ["elephant", "playing", "piano"]
    assert unknown_words("") == []
    assert "ball" in nearest_known("sphere", encoder)


def test_what_the_latent_detector_tells_makes_the_clip_show_what_is_stated(tiny):
    torch.manual_seed(1)
    clips = clips_that_switch()
    clips.latents = torch.randn(200, 9, 4, 2, 2)
    detector = LatentDetector(4, 16).eval().requires_grad_(False)
    settings = DistillTraining(steps={1: (1000.0,)}, batch_size=4, told_noise=0.0)
    encoder = WordLlamaEncoder(8)
    game = Distillation(settings, tiny, clips, clips, encoder, 0, Team(), detector)
    draw = clips.draw(4, 3)
    batch = clips.take(draw)

    def loss(clip):
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            return float(stated_loss(detector(clip), batch.scenes, draw.stated))

    told, shares = game._told(batch.latents.clone(), draw.stated, batch.scenes, torch.Generator().manual_seed(0))
    assert loss(batch.latents - 1e-2 * told / told.abs().max()) < loss(batch.latents)
    nothing = draw.with_some_empty(1.0, random.Random(0)).stated
    untold = game._told(batch.latents.clone(), nothing, batch.scenes, torch.Generator())
    assert max(part.abs().max() for part in untold) == 0

    def apart(clip):
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            return float(spread_loss(detector(clip), batch.scenes, draw.stated))

    assert apart(batch.latents - 1e-2 * shares / shares.abs().max()) < apart(batch.latents)


def test_a_clip_that_is_to_be_blurred_is_not_told_its_details():
    stated = [frozenset({"shape", "colour", "blurry"}), frozenset({"shape", "noisy"})]
    assert legible(stated) == [frozenset({"colour", "blurry"}), frozenset({"shape", "noisy"})]


def test_only_what_is_stated_counts():
    scenes = sample_scenes(3, torch.Generator().manual_seed(0)).replace(count=0)
    logits = {name: torch.zeros(3, size, requires_grad=True) for name, size in HEADS.items()}
    stated_loss(logits, scenes, [frozenset({"colour"}), frozenset({"blurry"}), frozenset()]).backward()
    touched = {name for name, value in logits.items() if value.grad is not None and value.grad.abs().max() > 0}
    assert touched == {"colour", "flaws"}
    assert logits["colour"].grad[1:].abs().max() == 0
    assert (logits["flaws"].grad != 0).sum() == 1
