"""What a student learns from a teacher, by hand."""

from __future__ import annotations

import pytest
import torch

from jeton.ops.distillation import attention_mse, logit_kl, token_mse


def test_logits_agree_where_distributions_do():
    student = torch.tensor([[0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, -1.0]], requires_grad=True)
    assert logit_kl(student + 3, student - 2) < 1e-7
    p = torch.tensor([1.0, -1.0]).softmax(0)
    loss = logit_kl(student, teacher)
    assert loss.item() == pytest.approx(float((p * (p * 2).log()).sum()), abs=1e-6)
    loss.backward()
    assert student.grad is not None and teacher.grad is None
    assert logit_kl(student, teacher, 2.0).item() == pytest.approx(4 * logit_kl(student / 2, teacher / 2).item(), abs=1e-6)


def test_tokens_count_as_they_weigh():
    student, teacher = torch.zeros(1, 2, 2), torch.tensor([[[1.0, 1.0], [2.0, 4.0]]])
    assert token_mse(student, teacher).item() == pytest.approx((1 + 10) / 2)
    assert token_mse(student, teacher, torch.tensor([[1.0, 0.0]])).item() == pytest.approx(1)
    assert token_mse(student, teacher, torch.zeros(1, 2)).item() == 0


def test_attention_maps_by_mean_or_sum():
    student, teacher = torch.zeros(2, 3, 4, 5), torch.full((2, 3, 4, 5), 0.5)
    assert attention_mse(student, teacher).item() == pytest.approx(0.25)
    assert attention_mse(student, teacher, summed=True).item() == pytest.approx(5.0)
