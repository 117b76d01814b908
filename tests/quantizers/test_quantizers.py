"""Every quantizer against numbers worked by hand, and all of them against what they have in common."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_model

from jeton.ops.codes import histogram, kl_to_uniform, pack_bits, perplexity, unpack_bits, usage
from jeton.quantizers import BSQ, EMAVQ, FSQ, LFQ, VQ, Bernoulli, CosineVQ, DimensionWise, Product, Residual, SharedIndex
from jeton.quantizers.compose import shared_index
from jeton.quantizers.dimwise import levels

ALL = {
    "vq": lambda: VQ(6, 16),
    "cosine": lambda: CosineVQ(6, 16),
    "ema": lambda: EMAVQ(6, 16),
    "fsq": lambda: FSQ([8, 5, 5, 4, 3, 3]),
    "lfq": lambda: LFQ(6),
    "lfq-subcodes": lambda: LFQ(6, subcodes=2, group=3),
    "bsq": lambda: BSQ(6),
    "bernoulli": lambda: Bernoulli(6, subcodes=3),
    "residual": lambda: Residual([VQ(6, 16), VQ(6, 16), VQ(6, 16)]),
    "product": lambda: Product([CosineVQ(2, 16), VQ(4, 16)]),
    "shared": lambda: SharedIndex((4, 2), 16),
    "dimension-wise": lambda: DimensionWise(6, bits=4),
}


def made(name):
    torch.manual_seed(0)
    quantizer = ALL[name]()
    for parameter in quantizer.parameters():  # a fresh codebook lies within ±1/K: spread it
        torch.nn.init.normal_(parameter)
    return quantizer


@pytest.mark.parametrize("name", ALL)
class TestEvery:
    def test_ids_give_the_quantized_vectors_bit_for_bit(self, name):
        quantizer, z = made(name).eval(), torch.randn(2, 3, 5, 6)
        out = quantizer(z)
        assert out.ids.shape == ((2, 3, 5) if quantizer.subcodes == 1 else (2, 3, 5, quantizer.subcodes))
        assert out.ids.dtype == torch.long and out.ids.min() >= 0 and out.ids.max() < quantizer.codebook_size
        assert torch.equal(quantizer.decode(out.ids), out.z_q)
        assert torch.equal(quantizer.encode(z), out.ids)

    def test_a_sample_does_not_depend_on_its_batch(self, name):
        quantizer, z = made(name).eval(), torch.randn(4, 7, 6)
        assert torch.equal(quantizer(z).ids[1:2], quantizer(z[1:2]).ids)

    def test_the_gradient_passes(self, name):
        quantizer, z = made(name).train(), torch.randn(2, 5, 6, requires_grad=True)
        out = quantizer(z)
        (grad,) = torch.autograd.grad(out.z_q.sum() + out.loss, z)
        assert torch.isfinite(grad).all() and grad.abs().sum() > 0
        assert out.loss.dim() == 0 and torch.isfinite(out.loss)

    def test_lower_precision_is_quantized_in_float32(self, name):
        quantizer, z = made(name).eval(), torch.randn(2, 5, 6).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            out = quantizer(z)
        assert out.z_q.dtype == torch.bfloat16 and torch.equal(out.ids, quantizer(z.float()).ids)

    def test_weights_survive_a_file(self, name, tmp_path):
        quantizer, z = made(name).eval(), torch.randn(2, 5, 6)
        save_model(quantizer, str(tmp_path / "model.safetensors"))
        torch.manual_seed(1)
        other = ALL[name]().eval()
        other.load_state_dict(load_file(tmp_path / "model.safetensors"))
        assert torch.equal(other(z).z_q, quantizer(z).z_q)

    def test_a_wrong_width_is_refused(self, name):
        with pytest.raises(ValueError, match="6 numbers"):
            made(name)(torch.randn(2, 5, 7))

    def test_encode_learns_nothing(self, name):
        quantizer = made(name).train()
        before = {key: value.clone() for key, value in quantizer.state_dict().items()}
        quantizer.encode(torch.randn(2, 50, 6))
        assert quantizer.training and all(torch.equal(before[key], value) for key, value in quantizer.state_dict().items())


class TestVQ:
    def test_lookup_losses_and_gradients_by_hand(self):
        vq = VQ(2, 3)
        vq.codebook.data = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
        z = torch.tensor([[[0.9, 0.2], [0.5, 0.0]]], requires_grad=True)
        out = vq(z)
        assert out.ids.tolist() == [[1, 0]]  # 1 and 2 are equal, and so are 0 and 1 for the second: the lowest
        assert torch.equal(out.z_q, torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]))
        mean = (0.01 + 0.04 + 0.25) / 4
        assert out.losses["codebook"].item() == pytest.approx(mean) and out.losses["commitment"].item() == pytest.approx(mean / 4)
        assert torch.equal(torch.autograd.grad(out.z_q.sum(), z, retain_graph=True)[0], torch.ones_like(z))
        to_z, to_rows = torch.autograd.grad(out.loss, (z, vq.codebook))
        assert torch.allclose(to_z, 0.25 * 2 * (z - out.z_q).detach() / 4)
        assert torch.allclose(to_rows[1], 2 * torch.tensor([0.1, -0.2]) / 4)

    def test_beta_may_weigh_the_codebook_term_as_released_codes_do(self):
        vq = VQ(2, 4, beta_on="codebook")
        out = vq(torch.randn(3, 2))
        assert out.losses["codebook"].item() == pytest.approx(out.losses["commitment"].item() / 4)

    def test_a_codebook_of_the_inputs_has_no_error(self):
        vq, z = VQ(4, 32), torch.randn(2, 16, 4)
        vq.codebook.data = z.reshape(32, 4).clone()
        assert torch.equal(vq(z).z_q, z)

    def test_cosine_looks_at_directions_alone(self):
        vq = CosineVQ(2, 2)
        vq.codebook.data = torch.tensor([[10.0, 0.0], [0.1, 0.1]])
        z = torch.tensor([[0.3, 0.2]])
        out, plain = vq(z), VQ(2, 2)
        assert out.ids.item() == 1 and torch.allclose(out.z_q, torch.tensor([[0.5**0.5, 0.5**0.5]]))
        unit = F.normalize(z, dim=-1)
        assert out.losses["codebook"].item() == pytest.approx(F.mse_loss(out.z_q, unit).item())
        plain.codebook.data = torch.tensor([[0.3, 0.0], [9.0, 9.0]])
        assert plain(z).ids.item() == 0 and vq(100 * z).ids.item() == 1


class TestEMAVQ:
    def two(self, **options):
        vq = EMAVQ(1, 2, **options)
        vq.vq.codebook = torch.tensor([[0.0], [1.0]])
        vq.vq._codebook.embed_avg.copy_(torch.tensor([[[0.0], [1.0]]]))
        return vq.train()

    def test_one_update_by_hand(self):
        vq = self.two(decay=0.5, dead_below=0.0)
        out = vq(torch.tensor([[[0.2], [0.4], [0.9]]]))
        assert out.ids.tolist() == [[0, 0, 1]] and out.z_q.flatten().tolist() == [0, 0, 1]  # the codebook from before
        assert out.loss.item() == pytest.approx(0.25 * (0.04 + 0.16 + 0.01) / 3)
        n, m = (0.5 + 0.5 * 2, 0.5 + 0.5 * 1), (0.5 * 0.6, 0.5 + 0.5 * 0.9)
        total, eps = sum(n), 1e-5
        want = [mass / (total * (count + eps) / (total + 2 * eps)) for mass, count in zip(m, n)]
        assert vq.vq.codebook.flatten().tolist() == pytest.approx(want, rel=1e-6)

    def test_it_follows_the_formula_over_many_steps(self):
        torch.manual_seed(0)
        vq = EMAVQ(3, 5, dead_below=0.0).train()
        n, m, c = torch.ones(5), vq.vq.codebook.clone(), vq.vq.codebook.clone()
        for _ in range(20):
            z = torch.randn(1, 40, 3)
            hit = F.one_hot(torch.cdist(z[0], c).argmin(1), 5).float()
            vq(z)
            n, m = 0.99 * n + 0.01 * hit.sum(0), 0.99 * m + 0.01 * hit.T @ z[0]
            c = m / (n.sum() * (n + 1e-5) / (n.sum() + 5e-5))[:, None]
            assert torch.allclose(vq.vq.codebook, c, atol=1e-5)

    def test_dead_codes_restart_at_vectors_of_the_batch(self):
        torch.manual_seed(0)
        vq = EMAVQ(2, 64).train()
        z = torch.randn(1, 256, 2) + 5  # a fresh codebook around 0: nearly all of it is never nearest
        dead = vq.usage(vq(z).ids)
        for _ in range(5):
            vq(z)
        assert dead < 0.5 < 0.8 < vq.usage(vq.encode(z))
        still = EMAVQ(2, 64, dead_below=0.0).train()
        for _ in range(6):
            still(z)
        assert still.usage(still.encode(z)) < 0.5

    def test_eval_changes_nothing(self):
        vq = self.two().eval()
        vq(torch.randn(1, 50, 1))
        assert vq.vq.codebook.flatten().tolist() == [0, 1]


class TestFSQ:
    def test_the_worked_table(self):
        fsq = FSQ([8, 5])
        out = fsq(torch.tensor([[0.3, -2.0], [0.0, 0.0], [10.0, 10.0], [-10.0, -10.0]]))
        assert out.ids.tolist() == [5, 20, 39, 0] and torch.equal(out.z_q[0], torch.tensor([0.25, -1.0]))
        assert FSQ([8, 8, 8, 5, 5, 5])(torch.zeros(1, 6)).ids.item() == 32036
        assert not out.losses and out.loss.item() == 0

    def test_every_id_returns(self):
        fsq = FSQ([8, 8, 8, 5, 5, 5])
        ids = torch.arange(64000)
        codes = fsq.decode(ids)
        assert len(codes.unique(dim=0)) == 64000
        half = torch.tensor([4, 4, 4, 2, 2, 2])
        place = torch.tensor([1, 8, 64, 512, 2560, 12800])
        assert torch.equal(((codes * half).round().long() + half) @ place, ids)

    def test_the_gradient_is_that_of_the_bounded_value(self):
        z = torch.tensor([[0.3, -2.0]], requires_grad=True)
        (grad,) = torch.autograd.grad(FSQ([8, 5])(z).z_q.sum(), z)
        half = torch.tensor([7.0, 4.0]) * 1.001 / 2
        shift = torch.tensor([math.atanh(0.5 / half[0]), 0.0])
        want = half * (1 - (z.detach() + shift).tanh().square()) / torch.tensor([4.0, 2.0])
        assert torch.allclose(grad, want, atol=1e-6)

    def test_levels_that_cannot_be_are_refused(self):
        for bad in ([2, 8], [], [64000, 64000]):
            with pytest.raises(ValueError, match="levels of at least 3"):
                FSQ(bad)


class TestBinary:
    def test_ids_have_the_most_significant_bit_first(self):
        lfq = LFQ(4)
        out = lfq(torch.tensor([[0.5, -0.5, 2.0, 0.1], [0.0, 0.0, 0.0, 0.0]]))
        assert out.ids.tolist() == [11, 0]  # sign(0) = -1
        assert out.z_q[0].tolist() == [1, -1, 1, 1]
        bits = torch.tensor([1, 0, 1, 1])
        assert pack_bits(bits, 2).tolist() == [2, 3] and unpack_bits(torch.tensor([2, 3]), 2).long().tolist() == bits.tolist()

    def test_many_bits_are_kept_as_several_ids(self):
        lfq, z = LFQ(64, group=8), torch.randn(3, 64)
        out = lfq(z)
        assert out.ids.shape == (3, 4) and torch.equal(lfq.decode(out.ids), out.z_q)
        with pytest.raises(ValueError, match="at most 31 bits"):
            LFQ(64, subcodes=1, group=8)

    @pytest.mark.parametrize("quantizer", [LFQ(3, group=3), BSQ(3)])
    def test_the_sign_of_zero_is_minus(self, quantizer):
        assert quantizer.encode(torch.tensor([[0.0, 1.0, 0.0]])).tolist() == [0b010]

    def test_spherical_probabilities_and_entropies_by_hand(self):
        bsq = BSQ(2, gamma1=0.0, entropy_weight=1.0)
        out = bsq(torch.tensor([[0.8, -0.1]]))
        assert torch.allclose(out.z_e, torch.tensor([[0.8, -0.1]]))
        u = F.normalize(torch.tensor([0.8, -0.1]), dim=0)
        assert u.tolist() == pytest.approx([0.992, -0.124], abs=5e-4)
        assert (4 * u / 2**0.5).sigmoid().tolist() == pytest.approx([0.943, 0.413], abs=5e-4)
        assert out.losses["entropy"].item() == pytest.approx(0.2185 + 0.6780, abs=2e-4)
        assert out.z_q.norm().item() == pytest.approx(1) and out.ids.item() == 2

    def test_the_entropy_of_a_group_needs_no_table(self):
        torch.manual_seed(0)
        z = torch.randn(50, 4)
        codes = unpack_bits(torch.arange(16)[:, None], 4).float() * 2 - 1
        p = (2 * z @ codes.T).softmax(-1)
        single = torch.special.entr(p).sum(-1).mean()
        spread = torch.special.entr(p.mean(0)).sum()
        assert LFQ(4, gamma1=0.0).entropy(z).item() == pytest.approx(single.item(), rel=1e-5)
        assert LFQ(4).entropy(z).item() == pytest.approx((single - spread).item(), rel=1e-4)

    def test_it_agrees_with_the_package_where_both_can(self):
        from vector_quantize_pytorch import LFQ as Theirs

        torch.manual_seed(0)
        z = torch.randn(2, 30, 5)
        ours, theirs = LFQ(5, beta=0.0, entropy_weight=1.0), Theirs(dim=5, entropy_loss_weight=1.0)
        out, (q, ids, loss) = ours(z), theirs(z, inv_temperature=1.0)
        assert torch.equal(out.ids, ids.long()) and torch.allclose(out.z_q, q)
        assert out.loss.item() == pytest.approx(loss.item(), abs=1e-3)  # theirs clamps probabilities at 1e-5

    def test_bernoulli_draws_in_training_and_decides_in_eval(self):
        torch.manual_seed(0)
        quantizer = Bernoulli(1, temperature=0.5)
        z = torch.full((20000, 1), 0.4, requires_grad=True)
        out = quantizer(z)
        assert out.z_q.mean().item() == pytest.approx(torch.tensor(0.8).sigmoid().item(), abs=0.01)
        (grad,) = torch.autograd.grad(out.z_q.sum(), z)
        s = torch.tensor(0.4).sigmoid()
        assert torch.allclose(grad, (s * (1 - s)).expand_as(grad))  # the same for a drawn 0 and a drawn 1
        assert out.losses["spread"].item() == pytest.approx((s * (1 - s)).item(), rel=1e-5)
        assert quantizer.eval()(z).z_q.min() == 1 and quantizer(-z).z_q.max() == 0 and quantizer(0 * z).z_q.max() == 0


class TestComposed:
    def test_residual_errors_by_hand(self):
        book = VQ(1, 6)
        book.codebook.data = torch.tensor([[-1.0], [-0.5], [-0.25], [0.25], [0.5], [1.0]])
        rvq = Residual([book, book, book])
        z = torch.tensor([[1.3]])
        out = rvq(z)
        errors = [(z - rvq.decode(out.ids[..., :m])).square().item() for m in (1, 2, 3)]
        assert errors == pytest.approx([0.09, 0.0025, 0.04], abs=1e-6)  # not monotone: this codebook does not hold 0
        assert out.losses["commitment"].item() == pytest.approx(0.25 * sum(errors) / 3, rel=1e-5)
        with pytest.raises(ValueError, match="1 to 3 stages"):
            rvq.decode(torch.zeros(1, 4, dtype=torch.long))

    def test_with_zero_in_the_codebook_more_stages_are_never_worse(self):
        torch.manual_seed(0)
        stages = [VQ(3, 8) for _ in range(4)]
        for stage in stages:
            stage.codebook.data = torch.cat([torch.zeros(1, 3), torch.randn(7, 3)])
        rvq, z = Residual(stages), torch.randn(100, 3)
        ids = rvq.encode(z)
        errors = torch.stack([(z - rvq.decode(ids[:, :m])).square().sum(-1) for m in range(1, 5)])
        assert (errors.diff(dim=0) <= 1e-6).all()

    def test_a_product_is_its_parts(self):
        torch.manual_seed(0)
        parts = [VQ(2, 8), VQ(3, 8)]
        z = torch.randn(4, 5)
        out = Product(parts)(z)
        assert torch.equal(out.ids[:, 0], parts[0](z[:, :2]).ids) and torch.equal(out.ids[:, 1], parts[1](z[:, 2:]).ids)
        assert Product(parts).codebook_size == 8 and Product(parts).subcodes == 2

    def test_the_shared_index_by_hand(self):
        semantic, pixel = torch.tensor([0.1, 0.5]), torch.tensor([1.0, 0.2])
        assert shared_index(semantic, pixel).item() == 1 and shared_index(semantic, pixel, weight=0.0).item() == 0

    def test_the_shared_index_is_what_the_distances_say(self):
        torch.manual_seed(0)
        quantizer, z = SharedIndex((3, 2), 16, weight=2.0), torch.randn(50, 5)
        s, p = (F.normalize(part, dim=-1) for part in z.split((3, 2), -1))
        books = [F.normalize(book, dim=-1) for book in quantizer.codebooks]
        distance = torch.cdist(s, books[0]).square() + 2 * torch.cdist(p, books[1]).square()
        out = quantizer(z)
        assert torch.equal(out.ids, distance.argmin(-1))
        assert torch.allclose(out.z_q.norm(dim=-1), torch.tensor(2.0).sqrt())  # two unit halves

    def test_what_does_not_fit_together_is_refused(self):
        for bad in ([], [VQ(2, 8), VQ(2, 16)], [VQ(2, 8), VQ(3, 8)], [LFQ(4, subcodes=2)]):
            with pytest.raises(ValueError, match="stages"):
                Residual(bad)


class TestDimensionWise:
    def test_level_values(self):
        assert levels(1).tolist() == pytest.approx([-0.79116, 0.79116], abs=1e-5)
        assert levels(2).tolist() == pytest.approx([-1.26018, -0.32466, 0.32466, 1.26018], abs=1e-5)
        six = levels(6)
        assert six[32].item() == pytest.approx(0.019586, abs=1e-6) and six[-1].item() == pytest.approx(2.43710, abs=1e-5)
        assert (six.diff() > 0).all() and torch.equal(six, -six.flip(0))

    def test_the_default_range(self):
        quantizer = DimensionWise(1)
        out = quantizer(torch.tensor([[0.0], [5.0], [20.0]]))
        assert out.ids.flatten().tolist() == [31, 63, 63]
        assert out.z_q.flatten().tolist() == pytest.approx([-0.0326, 4.0618, 4.0618], abs=1e-4)

    def test_the_range_matters_six_fold(self):
        torch.manual_seed(0)
        x = torch.randn(400_000, 1)
        wide, narrow = ((DimensionWise(1, low=-end, high=end)(x).z_q - x).square().mean().item() for end in (5.0, 3.0))
        assert wide == pytest.approx(6.6e-4, rel=0.1) and narrow == pytest.approx(4.0e-3, rel=0.1)
        step = 6 / 63
        uniform = ((x.clamp(-3, 3) / step - 0.5).round() + 0.5) * step
        assert (uniform - x).square().mean().item() == pytest.approx(1.18e-3, rel=0.15)

    def test_calibration_removes_mean_and_scale(self):
        torch.manual_seed(0)
        x = torch.randn(2000, 3) * torch.tensor([0.1, 1.0, 30.0]) + torch.tensor([5.0, 0.0, -90.0])
        quantizer = DimensionWise.calibrated(x)
        error = (quantizer(x).z_q - x).square().mean(0) / x.var(0)
        assert (error < 1e-3).all() and error.max() / error.min() < 2

    def test_with_a_matching_range_all_levels_are_equally_likely(self):
        torch.manual_seed(0)
        x = torch.randn(100_000, 1)
        counts = histogram(DimensionWise(1, bits=2, low=-3.0, high=3.0).encode(x), 4) / len(x)
        assert counts.tolist() == pytest.approx([0.25] * 4, abs=0.06)


def test_usage_and_perplexity():
    ids = torch.tensor([[0, 1], [1, 1]])
    assert usage(ids, 4).item() == 0.5
    assert perplexity(ids, 4).item() == pytest.approx(math.exp(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75))))
    assert perplexity(torch.arange(8), 8).item() == pytest.approx(8)


def test_kl_to_uniform_by_hand():
    assert kl_to_uniform(torch.arange(16), 16).item() == pytest.approx(0, abs=1e-6)
    assert kl_to_uniform(torch.zeros(2, 8, dtype=torch.long), 16).item() == pytest.approx(math.log(16))
    pairs = torch.tensor([[0, 1, 0, 1, 0]])  # 01 twice, 10 twice, of 4 pairs
    assert kl_to_uniform(pairs, 2, n=2).item() == pytest.approx(2 * math.log(2) - math.log(2))
