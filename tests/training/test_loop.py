"""What the loop makes of losses that stand out."""

from lora_dist.training.loop import SPIKE_MIN_LOSSES, is_spike


def test_a_spike_stands_out_of_the_recent_losses():
    recent = [2.0 + 0.1 * (i % 3) for i in range(SPIKE_MIN_LOSSES)]
    assert is_spike(4.0, recent) and not is_spike(2.3, recent) and not is_spike(1.0, recent)
    assert not is_spike(4.0, recent[1:])  # too few to tell
