"""Many runs on many GPUs: command lines as jobs (`jobs`), run as Ray tasks (`runner`)."""
