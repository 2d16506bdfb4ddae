"""VBench and VBench-Long: videos of their prompts, scored in an environment of their own."""
