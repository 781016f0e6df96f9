"""What a run says of itself: numbers, texts and pictures to its writers, lines and a bar to the terminal."""
