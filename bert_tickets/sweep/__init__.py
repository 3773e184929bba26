"""Many runs: command lines as jobs, who waits for whom, what is done already, the loop over free places, what is shown."""
