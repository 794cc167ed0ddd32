"""What serving asks for beside the attentions: caches that grow, masks by position, adapters."""
