import pytest
import torch
import torch.nn.functional as F
from transformers import PatchTSMixerConfig, PatchTSMixerForPrediction, PatchTSTConfig, PatchTSTForPrediction

from jeton.signals.ccm import (
    ChannelAssigner,
    ChannelClustering,
    ClusterLinear,
    PrototypeExchange,
    channel_similarity,
    cluster_loss,
    membership,
)
from jeton.signals.forecasters import DLinear, TimesNet, TSMixer, _Folding

L, H, C = 24, 6, 12
SHAPE = {"num_input_channels": C, "context_length": L, "prediction_length": H, "patch_length": 6, "patch_stride": 6}


def patchtst(layers=1):
    return PatchTSTForPrediction(
        PatchTSTConfig(**SHAPE, d_model=16, num_attention_heads=2, num_hidden_layers=layers, ffn_dim=32, loss="mse")
    )


def patchtsmixer():
    return PatchTSMixerForPrediction(PatchTSMixerConfig(**SHAPE, d_model=16, num_layers=1, loss="mse"))


HOSTS = {
    "dlinear": lambda: DLinear(L, H, 7),
    "tsmixer": lambda: TSMixer(L, H, C),
    "timesnet": lambda: TimesNet(L, H, C, width=8, hidden=8, blocks=1, kernels=2),
    "patchtst": patchtst,
    "patchtsmixer": patchtsmixer,
}


def forecast(host, past):
    found = host(past_values=past)
    return getattr(found, "prediction_outputs", found)


class TestClusterLinear:
    def test_one_cluster_is_the_shared_linear(self):
        torch.manual_seed(0)
        linear, x = torch.nn.Linear(L, H), torch.randn(4, C, L)
        assert torch.allclose(ClusterLinear.like(linear, 1)(x, torch.ones(C, 1)), linear(x), atol=1e-6)

    def test_a_cluster_for_each_variate_is_a_linear_for_each(self):
        torch.manual_seed(0)
        clustered, x = ClusterLinear(L, H, C).double(), torch.randn(4, C, L).double()
        order = torch.randperm(C)
        p = F.one_hot(order, C).double()
        want = torch.stack([F.linear(x[:, c], clustered.weight[k], clustered.bias[k]) for c, k in enumerate(order)], 1)
        assert torch.allclose(clustered(x, p), want, atol=1e-14)
        assert not torch.allclose(clustered(x, p.flip(0)), want, atol=0.1)  # twin: other variates' maps

    def test_mixed_outputs_are_mixed_weights(self):
        torch.manual_seed(0)
        clustered, x, p = ClusterLinear(L, H, 4), torch.randn(5, C, L), torch.randn(C, 4).softmax(-1)
        outputs = torch.stack([F.linear(x, clustered.weight[k], clustered.bias[k]) * p[:, k, None] for k in range(4)]).sum(0)
        assert torch.allclose(clustered(x, p), outputs, atol=1e-6)
        assert torch.allclose(clustered(x, p.expand(5, -1, -1)), outputs, atol=1e-6)

    def test_shares_are_needed_and_must_fit(self):
        with pytest.raises(ValueError, match="needs each variate's shares"):
            ClusterLinear(L, H, 2)(torch.randn(1, C, L))
        with pytest.raises(ValueError, match="5 variates"):
            ClusterLinear(L, H, 2)(torch.randn(1, C, L), torch.ones(5, 2))


class TestParts:
    def test_the_cluster_loss_by_hand(self):
        past = torch.tensor([[[0.0, 0.0, 2.0]]])  # one step, variates 0 and 1 alike, 2 apart: d² / max d² is 0 or 1
        s = torch.exp(torch.tensor(-5.0)).item()
        assert torch.allclose(channel_similarity(past, 5.0), torch.tensor([[1, 1, s], [1, 1, s], [s, s, 1]]))
        p = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]])
        member = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        alike, total = 5, 5 + 4 * s  # sum of S where variates share a cluster, and everywhere
        want = -alike + (total - alike) + 3 + torch.tensor(2.0).log().item() / 3
        assert cluster_loss(p, member, past).item() == pytest.approx(want, rel=1e-5)
        apart = cluster_loss(p, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), past)
        assert apart > want  # alike variates in different clusters cost more

    def test_membership_is_a_relaxed_draw(self):
        torch.manual_seed(0)
        p = torch.tensor([[0.8, 0.2]]).expand(20000, 2)
        drawn = membership(p, 0.07, noise=True)
        assert (drawn > 0.5).float().mean(0).tolist() == pytest.approx([0.8, 0.2], abs=0.01)
        assert torch.equal(membership(p, 0.07, noise=False), membership(p, 0.07, noise=False))

    def test_prototypes_move_to_what_their_members_are(self):
        torch.manual_seed(0)
        assigner = ChannelAssigner(L, 2, 8)
        before, e = assigner.prototypes.clone(), torch.randn(3, C, 8)
        member = torch.zeros(C, 2)
        member[:4, 0] = member[4:, 1] = 1
        weight = torch.softmax(before @ e.mT / 8**0.5, -1)
        assigner.move(e, member)
        assert torch.allclose(assigner.prototypes[0], (weight[:, 0, :4, None] * e[:, :4]).sum(1).mean(0), atol=1e-6)


@pytest.mark.parametrize("name", HOSTS)
class TestHosts:
    def test_at_first_every_cluster_is_the_host_itself(self, name):
        torch.manual_seed(0)
        host, past = HOSTS[name]().eval(), torch.randn(3, L, C)
        want = forecast(host, past).detach()
        model = ChannelClustering(host, L, C).eval()
        found, p = model(past)
        assert found.shape == (3, H, C) and p.shape == (C, 4) and torch.allclose(p.sum(-1), torch.ones(C))
        assert torch.allclose(found, want, atol=1e-5)

    def test_permuting_variates_permutes_shares_and_forecast(self, name):
        if name in ("tsmixer", "timesnet"):
            pytest.skip("the host itself mixes variates by their place")
        torch.manual_seed(0)
        model, past, order = ChannelClustering(HOSTS[name](), L, C).eval(), torch.randn(3, L, C), torch.randperm(C)
        for part in model.modules():
            if isinstance(part, ClusterLinear):
                torch.nn.init.normal_(part.weight, std=0.2)
        (plain, p), (moved, q) = model(past), model(past[..., order])
        assert torch.allclose(q, p[order], atol=1e-5) and torch.allclose(moved, plain[..., order], atol=1e-4)
        assert not torch.allclose(moved, plain, atol=0.05)

    def test_training_moves_weights_and_prototypes_and_eval_does_not(self, name):
        torch.manual_seed(0)
        model, past, future = ChannelClustering(HOSTS[name](), L, C), torch.randn(3, L, C), torch.randn(3, H, C)
        before = model.assigner.prototypes.clone()
        assert "assigner.prototypes" not in dict(model.named_parameters())
        sum(model.losses(past, future).values()).backward()
        assert model.assigner.embed.weight.grad.abs().sum() > 0
        assert all(part.weight.grad.abs().sum() > 0 for part in model.modules() if isinstance(part, ClusterLinear))
        assert not torch.equal(model.assigner.prototypes, before)
        model.eval()
        after = model.assigner.prototypes.clone()
        assert torch.equal(model(past)[0], model(past)[0]) and torch.equal(model.assigner.prototypes, after)


class TestTimesNet:
    def test_the_strongest_periods_fold_the_series(self):
        """A sine of period 6 and half of one of period 4; a folding that hands on what it sees doubles the series."""
        t = torch.arange(24.0)
        x = ((t * torch.pi / 3).sin() + 0.5 * (t * torch.pi / 2).sin())[None, :, None].expand(2, -1, 3)
        block, seen = _Folding(3, 3, periods=2, kernels=1), []
        block.conv = torch.nn.Identity()
        block.conv.register_forward_hook(lambda module, args, output: seen.append(output.shape))
        assert torch.allclose(block(x), 2 * x, atol=1e-5)
        assert seen == [(2, 3, 4, 6), (2, 3, 6, 4)]  # rows of one period: 24 / 6, then 24 / 4
        assert torch.equal(block._folded(x, 7), x)  # filled up to 28 and cut again
        other = torch.stack([x[0], 3 * (t * torch.pi / 2).sin()[:, None].expand(-1, 3)])
        block.periods = 1
        block(other)
        assert seen[3:] == [(2, 3, 6, 4)]  # the strongest of the whole batch, not of its first sample

    def test_a_forecast_follows_scale_and_place_of_the_past(self):
        torch.manual_seed(0)
        host, past = TimesNet(L, H, C, width=8, hidden=8, blocks=1, kernels=2).eval(), torch.randn(2, L, C)
        plain, moved = host(past), host(3 * past + 5)
        assert plain.shape == (2, H, C) and torch.allclose(moved, 3 * plain + 5, atol=1e-3)
        assert TimesNet(3, 1, C, width=8).eval()(past[:, :3]).isfinite().all()  # fewer than 5 frequencies


class TestExchange:
    def test_prototypes_and_variates_hear_each_other_by_hand(self):
        torch.manual_seed(0)
        part, x, c, member = PrototypeExchange(4, 2, 8).eval(), torch.randn(2, 3, 5, 4), torch.randn(2, 4), torch.rand(3, 2)

        def attend(maps, queries, others, share=None):
            out = []
            q, k, v = maps[0](queries), maps[1](others), maps[2](others)
            for head in (slice(0, 2), slice(2, 4)):
                weight = torch.softmax(q[:, head] @ k[:, head].T / 2**0.5, -1)
                out.append((weight if share is None else weight * share) @ v[:, head])
            return maps[3](torch.cat(out, -1))

        found, new = part(x, c, member)
        heard = torch.zeros(2, 4)
        for sample in range(2):
            for step in range(5):
                variates = x[sample, :, step]
                prototypes = attend(part.to_prototypes, c, variates, member.T)
                heard += prototypes / 10
                y = part.norm1(variates + attend(part.to_variates, variates, prototypes))
                assert torch.allclose(found[sample, :, step], part.norm2(y + part.mlp(y)), atol=1e-5)
        assert torch.allclose(new, heard, atol=1e-5)
        own, each = part(x, c.expand(2, -1, -1), member.expand(2, -1, -1))
        assert torch.allclose(own, found, atol=1e-5) and torch.allclose(each.mean(0), new, atol=1e-5)

    def test_who_is_no_member_is_not_heard(self):
        torch.manual_seed(0)
        part, x, c, member = PrototypeExchange(4, 2, 8).eval(), torch.randn(2, 3, 5, 4), torch.randn(2, 4), torch.rand(3, 2)
        other = x.clone()
        other[:, 2] += 1
        assert not torch.allclose(part(x, c, member)[0][:, :2], part(other, c, member)[0][:, :2], atol=1e-3)
        # a prototype's attention is shared out before members are known, so only the query side of the others' is left
        member[2] = 0
        scores = part.to_prototypes[1]
        torch.nn.init.zeros_(scores.weight)  # all variates are attended to alike
        assert torch.allclose(part(x, c, member)[0][:, :2], part(other, c, member)[0][:, :2], atol=1e-5)

    @pytest.mark.parametrize("pooled", [True, False])
    def test_it_runs_behind_every_layer_of_patchtst_and_learns(self, pooled):
        torch.manual_seed(0)
        model = ChannelClustering(patchtst(2), L, C, exchange=True, pooled=pooled)
        past, future, order = torch.randn(3, L, C), torch.randn(3, H, C), torch.randperm(C)
        assert model.assigner.prototypes.shape == (4, 16)
        sum(model.losses(past, future).values()).backward()
        exchanges = [module for module in model.modules() if isinstance(module, PrototypeExchange)]
        assert len(exchanges) == 2 and all(p.grad.abs().sum() > 0 for part in exchanges for p in part.to_variates.parameters())
        model.eval()
        (plain, p), (moved, q) = model(past), model(past[..., order])
        assert torch.allclose(q, p[..., order, :], atol=1e-5) and torch.allclose(moved, plain[..., order], atol=1e-4)
        other = past.clone()
        other[..., 0] += torch.randn(3, L)
        heard = (model(other)[0] - plain)[..., 1:].abs().max()
        alone = ChannelClustering(patchtst(2), L, C, pooled=pooled).eval()
        deaf = (alone(other)[0] - alone(past)[0])[..., 1:].abs().max()
        assert heard > 1e-5 and (deaf < 1e-7 or pooled)  # a host of its own looks at each variate alone

    def test_prototypes_of_one_layer_go_to_the_next(self):
        torch.manual_seed(0)
        model, past, seen = ChannelClustering(patchtst(2), L, C, exchange=True).eval(), torch.randn(3, L, C), []
        for module in model.modules():
            if isinstance(module, PrototypeExchange):
                module.register_forward_hook(lambda module, args, output: seen.append((args[1], output[1])))
        model(past)
        assert torch.equal(seen[0][0], model.assigner.prototypes) and torch.equal(seen[1][0], seen[0][1])
        assert not torch.allclose(seen[0][0], seen[1][0], atol=0.01)

    def test_hosts_without_layers_are_refused(self):
        with pytest.raises(ValueError, match="layers of PatchTSTForPrediction, not of DLinear"):
            ChannelClustering(DLinear(L, H, 7), L, C, exchange=True)
        with pytest.raises(ValueError, match="3 heads"):
            PrototypeExchange(16, 3, 8)


def test_shares_of_each_samples_own_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    past = torch.randn(4, L, C)
    own, pooled = (ChannelClustering(DLinear(L, H, 7), L, C, pooled=flag).eval() for flag in (False, True))
    assert torch.allclose(own(past)[1][1:2], own(past[1:2])[1], atol=1e-6)
    assert not torch.allclose(pooled(past)[1], pooled(past[1:2])[1], atol=1e-2)  # the paper's shares do


def test_what_cannot_be_clustered_is_refused():
    with pytest.raises(ValueError, match="1 to 12 clusters"):
        ChannelClustering(DLinear(L, H, 7), L, C, clusters=13)
    with pytest.raises(ValueError, match="say which linear maps"):
        ChannelClustering(torch.nn.Linear(L, H), L, C)
    with pytest.raises(ValueError, match="no module 'nothing'"):
        ChannelClustering(DLinear(L, H, 7), L, C, linears=("nothing",))
    with pytest.raises(ValueError, match=r"\(B, L, 12\)"):
        ChannelClustering(DLinear(L, H, 7), L, C)(torch.randn(2, L, 5))


def families(samples, seed):
    """12 variates of 3 families. Each family has a pattern that stands in its past and a map from what is random in the past to
    the future; no linear map serves two families."""
    fixed, drawn = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    pattern, maps = 1.5 * torch.randn(3, L, generator=fixed), torch.randn(3, H, L, generator=fixed) * L**-0.5
    family = torch.arange(C) % 3
    noise = torch.randn(samples, C, L, generator=drawn)
    future = torch.einsum("bcl,chl->bch", noise, maps[family]) + 0.1 * torch.randn(samples, C, H, generator=drawn)
    return (noise + pattern[family]).mT, future.mT, family


def test_it_finds_the_families_and_beats_shared_and_individual_heads():
    from sklearn.metrics import adjusted_rand_score

    (past, future, family), (later, target, _) = families(24, 1), families(400, 2)
    errors, shares = {}, None
    for name, clusters in (("shared", 1), ("families", 3), ("individual", C)):
        torch.manual_seed(0)
        model = ChannelClustering(DLinear(L, H, 7), L, C, clusters=clusters)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(200):
            if name == "individual":
                loss = F.mse_loss(individual(model, past), future)
            else:
                loss = sum(model.losses(past, future).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            found = individual(model, later) if name == "individual" else model(later)[0]
            shares = model(later)[1] if name == "families" else shares
        errors[name] = F.mse_loss(found, target).item()
    assert adjusted_rand_score(family, shares.argmax(-1)) > 0.9
    assert errors["families"] < 0.8 * min(errors["shared"], errors["individual"])


def individual(model, past):
    """The same host with a head for each variate."""
    parts = [part for part in model.host.modules() if isinstance(part, ClusterLinear)]
    for part in parts:
        part.shares = torch.eye(C)
    found = model.host(past_values=past)
    for part in parts:
        part.shares = None
    return found
