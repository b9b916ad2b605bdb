"""What tests share: workers, programs, cases, tiny models."""
