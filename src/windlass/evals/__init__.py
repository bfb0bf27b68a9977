"""A model of lm-eval-harness, in this process. `harness` alone imports lm_eval."""
