"""What every other package uses: errors, whole files, retries, processes, tokens. Imports nothing else of patchscan."""
